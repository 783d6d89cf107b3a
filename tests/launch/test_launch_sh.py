"""launch.sh with a stand-in for Python that makes environments and installs packages in no time."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "awk bash cat cut df dirname du find grep mkdir mv rm rmdir sleep tail uname".split()
FAKES_TOOLS = ["chmod", "touch"]

pytestmark = pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="needs bash and POSIX")

# Answers each way in which launch.sh calls a Python; what has to be computed is left to the real one.
FAKE_PYTHON = """\
#!/bin/sh
case "$*" in
  --version) echo "Python 3.12.0" ;;
  "-E -S -c"*) echo "${{FAKE_ANSWER-ok 3.12.0}}" ;;
  "-I -S -c"* | *--check*) exec {python} "$@" ;;
  "-m venv "*)
    mkdir -p "$3/bin"
    touch "$3/pyvenv.cfg"
    [ "${{FAKE_VENV-}}" != cut ] || kill -KILL "$PPID" $$
    cat "$0" >"$3/bin/python" && chmod +x "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install"*)
    echo install >>"$FAKE_CALLS"
    echo "${{FAKE_PIP-}}"
    sleep "${{FAKE_SECONDS-0}}"
    [ -z "${{FAKE_PIP-}}" ] || exit 1 ;;
  "-P -m finetune.launch"*) shift 3; echo "ran: $*" ;;
  *) echo "not expected: $*" >&2; exit 99 ;;
esac
"""


class Checkout:
    """A copy of what launch.sh reads, with the stand-in as the only Python on PATH."""

    def __init__(self, folder):
        self.root = folder / "check out"  # a space, as many users' folders have
        self.root.mkdir(parents=True)
        for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        # All that the launcher imports: what is missing would come from an installed package, with other code.
        launcher = [
            f"launch/{name}.py"
            for name in ("__init__", "__main__", "launcher", "child", "hardware", "command", "threads")
        ]
        needed = ["core/__init__.py", "core/extras.py", "core/outside_text.py"]
        for name in ("__init__.py", "errors.py", "lookup.py", *needed, *launcher):
            (self.root / "finetune" / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / "finetune" / name, self.root / "finetune" / name)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS + FAKES_TOOLS:
            path = shutil.which(tool)
            assert path, tool
            (self.bin / tool).symlink_to(path)
        self.add_python("python3.12")
        self.calls = folder / "calls"
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "FAKE_CALLS": str(self.calls),
            "FINETUNE_MIN_FREE_GB": "0",
        }
        self.venv = self.root / ".venv"
        self.stamp = self.venv / ".launch-stamp"
        self.lock = self.venv / ".launch-lock"

    def add_python(self, name):
        path = self.bin / name
        path.write_text(FAKE_PYTHON.format(python=shlex.quote(sys.executable)))
        path.chmod(0o755)

    def start(self, *args, **env):
        return subprocess.Popen(
            [str(self.root / "launch.sh"), *args],
            env=self.env | env,
            cwd=self.bin,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A Ctrl-C is ignored, and cannot be trapped, by what is started in the background of a script.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *args, code=0, **env):
        with self.start(*args, **env) as process:
            try:
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()  # nothing to do unless it hangs
        assert process.returncode == code, err
        return out, err

    @property
    def num_installs(self):
        return self.calls.read_text().count("install") if self.calls.exists() else 0


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def wait_until(true):
    limit = time.monotonic() + 30
    while not true() and time.monotonic() < limit:
        time.sleep(0.02)


def test_first_call_installs_and_the_next_ones_do_not(checkout):
    out, err = checkout.run("test", "-k", "a b")
    assert out == "ran: test -k a b\n"
    assert "installing the pinned packages" in err and "done in" in err
    assert not checkout.lock.exists()
    assert checkout.run("setup") == ("ran: setup\n", "")
    assert checkout.num_installs == 1


def test_change_of_what_is_wanted_installs_again(checkout):
    checkout.run("setup")
    for count, name in enumerate(["pyproject.toml", "constraints.txt"], start=2):
        with open(checkout.root / name, "a") as file:
            file.write("# changed\n")
        checkout.run("setup")
        assert checkout.num_installs == count


def test_checkout_that_was_copied_installs_again(checkout):
    # Its editable install points to the folder it was copied from.
    checkout.run("setup")
    copy = checkout.root.with_name("copy")
    shutil.copytree(checkout.root, copy)
    checkout.root = copy
    checkout.run("setup")
    assert checkout.num_installs == 2


def test_another_index_installs_again_but_an_unset_one_does_not(checkout):
    checkout.run("setup", PIP_INDEX_URL="file:///a")
    checkout.run("setup", PIP_INDEX_URL="file:///a")
    checkout.run("setup")
    assert checkout.num_installs == 1
    checkout.run("setup", PIP_INDEX_URL="file:///b")
    assert checkout.num_installs == 2


def test_help_needs_nothing(checkout):
    out, _ = checkout.run("-h", PYTHON="/nowhere")
    assert "usage: ./launch.sh COMMAND" in out
    _, err = checkout.run(code=2)
    assert "usage: ./launch.sh COMMAND" in err
    assert not checkout.venv.exists()


def test_wrong_word_is_refused_before_an_install(checkout):
    _, err = checkout.run("tset", code=2)
    assert "Did you mean 'test'?" in err
    assert not checkout.venv.exists()


# What may be missing


def test_old_python(checkout):
    _, err = checkout.run("setup", code=2, FAKE_ANSWER="old 3.9.18")
    assert "no Python 3.11 or later. Found: python3.12 (3.9.18)." in err
    assert "PYTHON=/path/to/python ./launch.sh" in err


def test_no_python(checkout):
    (checkout.bin / "python3.12").unlink()
    _, err = checkout.run("setup", code=2)
    assert "no Python 3.11 or later. Found: none." in err


def test_python_that_was_named_is_the_only_one_tried(checkout):
    _, err = checkout.run("setup", code=2, PYTHON=str(checkout.bin / "cat"))
    assert f"at PYTHON={checkout.bin / 'cat'}. Found: {checkout.bin / 'cat'} (does not run)." in err


def test_placeholder_on_path_is_passed_over(checkout):
    (checkout.bin / "python3.13").symlink_to(shutil.which("false"))
    checkout.run("setup")


def test_no_venv_module(checkout):
    _, err = checkout.run("setup", code=2, FAKE_ANSWER="no-venv 3.12.0")
    assert "python3.12 cannot make virtual environments" in err
    assert "apt install python3-venv" in err


def test_full_disk(checkout):
    _, err = checkout.run("setup", code=2, FINETUNE_MIN_FREE_GB="999999")
    assert "the install needs 999999 GB, but the disk of" in err and " GB free." in err
    assert "torch for the CPU" in err
    assert not checkout.lock.exists()


def test_disk_space_has_to_be_a_number(checkout):
    _, err = checkout.run("setup", code=2, FINETUNE_MIN_FREE_GB="7G")
    assert "FINETUNE_MIN_FREE_GB=7G is not a whole number" in err


def test_folder_that_cannot_be_made(checkout):
    _, err = checkout.run("setup", code=2, FINETUNE_VENV=str(checkout.root / "launch.sh" / "venv"))
    assert "cannot make the folder" in err and "set FINETUNE_VENV" in err


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written(checkout):
    checkout.venv.mkdir(mode=0o555)
    _, err = checkout.run("setup", code=2)
    assert f"cannot write to {checkout.venv}" in err


def test_folder_of_something_else_is_left_alone(checkout, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    _, err = checkout.run("setup", code=2, FINETUNE_VENV=str(mine))
    assert f"{mine} must be empty or a Python environment, but it holds other files" in err
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError'",
            "could not reach the package index",
        ),
        ("ERROR: 403 Client Error: Forbidden for url", "could not reach the package index"),
        ("ERROR: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for torch==2.14.1", "has no build of that package"),
        ("ERROR: [Errno 13] Permission denied", "cannot write to"),
        ("ERROR: something new", "the install failed; the lines above show where"),
    ],
)
def test_a_failed_install_names_the_reason_and_leaves_no_stamp(line, message, checkout):
    _, err = checkout.run("setup", code=2, FAKE_PIP=line)
    assert line in err and message in err
    assert not checkout.stamp.exists() and not checkout.lock.exists()
    checkout.run("setup")
    assert checkout.num_installs == 2


def test_no_network_and_an_environment_that_stands(checkout):
    _, err = checkout.run("setup", code=2, FINETUNE_SKIP_INSTALL="1")
    assert "there is no environment" in err
    checkout.run("setup")
    checkout.stamp.unlink()
    assert checkout.run("demo", FINETUNE_SKIP_INSTALL="1") == ("ran: demo\n", "")


# Interruptions, and two at once


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_install_ends_at_once_and_is_finished_by_the_next_call(signum, code, checkout):
    with checkout.start("setup", FAKE_SECONDS="60") as process:
        wait_until(lambda: checkout.num_installs == 1)
        process.send_signal(signum)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "the next call finishes the install" in err
    assert not checkout.stamp.exists() and not checkout.lock.exists()
    checkout.run("setup")
    assert checkout.num_installs == 2


def test_environment_that_was_cut_short_is_made_anew(checkout):
    checkout.run("setup", code=-signal.SIGKILL, FAKE_VENV="cut")
    assert checkout.lock.exists() and (checkout.venv / "pyvenv.cfg").exists()
    checkout.run("setup")
    assert checkout.num_installs == 1


def test_packages_that_were_cut_short_are_installed_again(checkout):
    checkout.run("setup")
    checkout.stamp.unlink()
    packages = checkout.venv / "lib" / "python3.12" / "site-packages"
    (packages / "whole-1.dist-info").mkdir(parents=True)
    (packages / "whole-1.dist-info" / "RECORD").touch()
    (packages / "torn-1.dist-info").mkdir()
    checkout.run("setup")
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


def test_two_at_once_install_once(checkout):
    with (
        checkout.start("setup", FAKE_SECONDS="1") as first,
        checkout.start("demo", FAKE_SECONDS="1") as second,
    ):
        results = [process.communicate() for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert [out for out, _ in results] == ["ran: setup\n", "ran: demo\n"]
    assert sum("waiting for it" in err for _, err in results) == 1
    assert checkout.num_installs == 1


def test_install_that_outlives_its_launcher_keeps_the_lock(checkout):
    with checkout.start("setup", FAKE_SECONDS="2") as killed:
        wait_until(lambda: checkout.num_installs == 1 and len(checkout.lock.joinpath("holder").read_text().split()) > 3)
        killed.kill()  # and left a zombie, which must not count as running
        began = time.monotonic()
        _, err = checkout.run("setup")
    assert time.monotonic() - began > 1
    assert "waiting for it" in err


def test_lock_of_another_machine_is_not_taken(checkout):
    checkout.lock.mkdir(parents=True)
    (checkout.lock / "holder").write_text("another-machine\n999999999\n")
    with checkout.start("setup") as process:
        assert "waiting for it" in process.stderr.readline()
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 143
    assert checkout.lock.exists()  # not ours to remove

"""A child ends with us, gets each signal once, and its exit code is ours."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from finetune.launch.child import run_child


def in_a_python(code, *args, **options):
    """Start a Python of its own that runs ``code``, in which run_child handles real signals."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(7)", 7),
        pytest.param(
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            137,
            marks=pytest.mark.skipif(os.name != "posix", reason="exit codes of signals are POSIX's"),
        ),
    ],
)
def test_code_of_a_real_child(code, expected):
    handler = signal.getsignal(signal.SIGINT)
    assert run_child([sys.executable, "-c", code], env=os.environ) == expected
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.skipif(os.name != "posix", reason="Windows gives Ctrl-C to every process of a console itself")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_reaches_the_child_once(signum):
    child = """
        import signal, sys, time
        got = []
        signal.signal(int(sys.argv[1]), lambda signum, frame: got.append(signum))
        print("ready", flush=True)
        while not got:
            time.sleep(0.01)
        time.sleep(0.3)  # time for a second one to arrive, were there one
        sys.exit(40 + len(got))
    """
    parent = """
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        from finetune.launch.child import run_child
        sys.exit(run_child([sys.executable, "-c", sys.argv[1], sys.argv[2]], env=os.environ))
    """
    with in_a_python(parent, textwrap.dedent(child), int(signum)) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        assert process.wait(timeout=30) == 41


@pytest.mark.skipif(os.name != "posix", reason="Windows gives Ctrl-C to every process of a console itself")
def test_a_parent_of_several_children_learns_of_the_signal():
    """Also where the child takes the signal for a wish, and ends well."""
    child = """
        import signal, sys
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))
        print("ready", flush=True)
        signal.pause()
    """
    parent = """
        import os, sys
        from finetune.launch.child import run_child
        told = []
        code = run_child([sys.executable, "-c", sys.argv[1]], env=os.environ, passed_on=told)
        print(code, told, flush=True)
    """
    with in_a_python(parent, textwrap.dedent(child)) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == f"0 [{int(signal.SIGTERM)}]\n"


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
def test_signal_ends_what_the_child_started_too(tmp_path):
    # Like accelerate's launcher: a child that starts the training, waits, and dies of SIGTERM itself.
    grandchild = """
        import signal, sys, time
        def leave(signum, frame):
            open(sys.argv[1], "w").close()
            sys.exit()
        signal.signal(signal.SIGTERM, leave)
        print("ready", flush=True)
        time.sleep(60)
    """
    parent = """
        import os, sys
        from finetune.launch.child import run_child
        child = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
        sys.exit(run_child([sys.executable, "-c", child, *sys.argv[1:]], env=os.environ))
    """
    left = tmp_path / "left"
    with in_a_python(parent, textwrap.dedent(grandchild), left) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        assert process.stdout.read() == ""  # its other end is closed: the grandchild is gone
    assert left.exists()

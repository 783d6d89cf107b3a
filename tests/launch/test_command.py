"""What all commands share: usage of the subcommand at fault, the version, and a reader that leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.launch.command import exit_code_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "usage", "message"),
    [
        (["ask", "base", "a.png", "?", "--registri", "x"], "finetune ask", "--registri. Did you mean '--registry'?"),
        (["train", "a.yaml", "--fast"], "finetune train", "unknown option --fast."),
        (["export", "a/b", "--to", "peft", "--outptu=x"], "finetune export", "Did you mean '--output'?"),
        (["serve", "--bass", "pocket"], "finetune serve", "Did you mean '--base'?"),
        (["registry", "list", "--jsn"], "finetune registry list", "Did you mean '--json'?"),
        (["registry", "resolve", "a/b", "c/d"], "finetune registry resolve", "unexpected c/d"),
        (["find-lr", "a.yaml", "--steps", "30", "seed=1"], "finetune find-lr", "put arguments without a dash before"),
    ],
)
def test_an_unknown_option_shows_the_usage_of_its_own_command(words, usage, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.startswith(f"usage: {usage} [-h]") and f"{usage}: error: " in err and message in err


def test_the_version_names_what_is_computed_with_and_imports_none_of_it():
    code = "import sys; from finetune.cli import main\ntry: main(['--version'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    version, loaded = done.stdout.splitlines()
    assert version.startswith("finetune-vlm ") and all(name in version for name in ("torch ", "transformers ", "peft "))
    assert loaded == "False" and done.returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "finetune.cli", "--help"],
        ["-m", "finetune.cli", "schema"],  # more than a pipe holds
        ["-m", "finetune.cli", "registry", "list", "--json"],
        ["-m", "finetune.launch", "--help"],
        ["recipes/evaluate.py", "--help"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
def test_a_reader_that_leaves_ends_a_command_quietly(words, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    if unbuffered:
        env["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error_of_the_program():
    def run():
        raise BrokenPipeError("a worker has ended")

    with pytest.raises(BrokenPipeError, match="a worker"):
        exit_code_of(run)


def test_a_name_that_is_not_utf_8_is_printed(tmp_path):
    """A terminal that takes UTF-8 alone is no reason for a traceback."""
    code = "from finetune.launch.command import exit_code_of; exit_code_of(lambda: print('made', '\\udcff') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == (b"made \\udcff\n", b"")

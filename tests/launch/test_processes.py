"""What is shown of processes that failed, from what each of them left."""

import signal

import pytest

from finetune.errors import DataError, StoppedError
from finetune.launch import processes
from finetune.launch.processes import Failure, conclude, exit_code_of_process


def left(process, code=2, message="", traceback="", of=2):
    return Failure(process=process, of=of, time=float(process), code=code, message=message, traceback=traceback)


CRASH = "Traceback (most recent call last):\n  ...\nRuntimeError: "


@pytest.mark.parametrize(
    ("failures", "code", "signals", "shown", "exit_code"),
    [
        ([], 0, {}, "", 0),
        ([], 1, {}, "", 1),
        ([left(0, message="error: a", of=1)], 1, {}, "error: a", 2),
        ([left(0, message="error: a"), left(1, message="error: a")], 1, {}, "error: a", 2),
        (
            [left(0, message="error: a"), left(1, message="error: b")],
            1,
            {},
            "error: a (in process 0 of 2)\nerror: b (in process 1 of 2)",
            2,
        ),
        ([left(0, message="error: a"), left(1, 1, traceback=CRASH)], 1, {}, "error: a (in process 0 of 2)", 2),
        (
            [left(0, 1, traceback=f"{CRASH}a\n"), left(1, message="error: b")],
            1,
            {},
            f"process 0 of 2 failed:\n{CRASH}a\nprocess 1 of 2 then ended, too: error: b",
            1,
        ),
        (
            [left(0, 1, traceback=f"{CRASH}a"), left(1, 1, traceback=f"{CRASH}a")],
            1,
            {},
            f"process 0 of 2 failed:\n{CRASH}a",
            1,
        ),
        ([left(0, 143, message="the state is saved"), left(1, 143, message="the state is saved")], 1, {},
         "the state is saved", 143),
        # A process that is told to stop because another one failed is not the cause.
        ([left(0, 143, message="the state is saved"), left(1, message="error: b")], 1, {},
         "error: b (in process 1 of 2)", 2),
        ([left(0, 141), left(1, 1, traceback=f"{CRASH}closed")], 1, {}, "", 141),
        (
            [left(0, 1, traceback=f"{CRASH}closed")],
            1,
            {1: signal.SIGKILL},
            "the signal SIGKILL ended process 1. The system sends it when memory runs out; check its log (dmesg).\n"
            "process 0 of 2 then ended, too: RuntimeError: closed",
            137,
        ),
    ],
)  # fmt: skip
def test_the_cause_is_shown_once(failures, code, signals, shown, exit_code):
    assert conclude(failures, code, signals) == (shown, exit_code)


@pytest.fixture
def second_of_two(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def raising(error):
    def run():
        raise error

    return run


def test_a_process_leaves_its_failure_for_the_launcher(second_of_two, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(processes.VARIABLE, str(tmp_path))
    assert exit_code_of_process(raising(DataError("line 3"))) == 2
    [failure] = processes._read(tmp_path)
    assert (failure.process, failure.of, failure.code, failure.message) == (1, 2, 2, "error: line 3")
    assert exit_code_of_process(raising(ZeroDivisionError("x"))) == 1
    [failure] = processes._read(tmp_path)
    assert failure.code == 1 and failure.traceback.endswith("ZeroDivisionError: x\n")
    assert exit_code_of_process(raising(StoppedError("saved", signum=15))) == 143
    assert capsys.readouterr() == ("", "")


def test_a_process_without_such_a_launcher_shows_its_own(second_of_two, monkeypatch, capsys):
    monkeypatch.delenv(processes.VARIABLE, raising=False)
    assert exit_code_of_process(raising(DataError("line 3"))) == 2
    assert capsys.readouterr().err == "process 1 of 2: error: line 3\n"
    with pytest.raises(ZeroDivisionError):
        exit_code_of_process(raising(ZeroDivisionError("x")))


def test_a_failure_that_cannot_be_written_is_shown_at_once(second_of_two, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(processes.VARIABLE, str(tmp_path / "gone"))
    assert exit_code_of_process(raising(DataError("line 3"))) == 2
    assert capsys.readouterr().err == "process 1 of 2: error: line 3\n"

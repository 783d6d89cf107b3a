"""One process at a time in a folder; a process that has ended locks out no other."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from finetune.core import folder_lock
from finetune.core.folder_lock import LOCK_NAME, Owner, locked
from finetune.errors import FolderInUseError, TrainingError

ROOT = Path(__file__).parents[2]
ELSE = "Or go elsewhere."
posix = pytest.mark.skipif(os.name != "posix", reason="the system's locks are POSIX's")


def hold(folder, then="time.sleep(60)"):
    """Return a process that holds ``folder``."""
    code = f"""
        import os, time
        from pathlib import Path
        from finetune.core.folder_lock import locked
        with locked(Path({str(folder)!r}), what_else=""):
            print("held", flush=True)
            {then}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holder(tmp_path):
    """Return a process that holds the folder; it ends with the test."""
    process = hold(tmp_path)
    yield process
    process.kill()
    process.communicate()


@posix
def test_a_second_process_learns_which_process_holds_it(tmp_path, holder):
    since = json.loads((tmp_path / LOCK_NAME).read_text())["since"]
    with pytest.raises(FolderInUseError) as caught, locked(tmp_path, what_else=ELSE):
        pass
    user = Owner.here().user
    wanted = f"process {holder.pid} of {user} on {socket.gethostname()}, since {since}. Wait for it, or stop it. {ELSE}"
    assert str(caught.value) == f"{tmp_path} is in use: {wanted}"


@posix
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_holds_no_lock(tmp_path, holder, signum):
    holder.send_signal(signum)
    holder.wait(timeout=30)
    assert (tmp_path / LOCK_NAME).exists(), "its name is still there"
    logged = []
    with locked(tmp_path, log=logged.append, what_else=ELSE):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    (line,) = logged
    assert f"was locked by process {holder.pid} of " in line and line.endswith("This process takes the lock over.")


@posix
def test_a_worker_that_outlives_the_process_holds_no_lock(tmp_path):
    process = hold(tmp_path, "child = os.fork(); print(child, flush=True) if child else None; time.sleep(60)")
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait(timeout=30)
        with locked(tmp_path, what_else=ELSE):
            os.kill(child, 0)  # it still runs
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_it_is_let_go_at_the_end_and_on_an_error(tmp_path):
    for error in (None, ValueError, KeyboardInterrupt):
        try:
            with locked(tmp_path / "new", what_else=ELSE):
                assert (tmp_path / "new" / LOCK_NAME).exists()
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
        assert list((tmp_path / "new").iterdir()) == []


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with locked(tmp_path, what_else=ELSE):
        with (
            pytest.raises(FolderInUseError, match="in use: this process has already locked it"),
            locked(tmp_path, what_else=ELSE),
        ):
            pass
        assert (tmp_path / LOCK_NAME).exists(), "and the first still does"


def test_what_another_host_holds_is_refused_with_the_way_to_free_it(tmp_path):
    """Whether that process runs cannot be told, and the system's locks need not reach that far."""
    elsewhere = replace(Owner.here(), host="elsewhere", pid=7)
    (tmp_path / LOCK_NAME).write_text(json.dumps(asdict(elsewhere)))
    with pytest.raises(FolderInUseError) as caught, locked(tmp_path, what_else=ELSE):
        pass
    message = str(caught.value)
    assert "process 7 of" in message and "on elsewhere" in message and message.endswith(ELSE)
    assert f"If it has ended, delete {tmp_path.resolve() / LOCK_NAME} and start again." in message
    (tmp_path / LOCK_NAME).unlink()
    with locked(tmp_path, what_else=ELSE):
        pass


@posix
@pytest.mark.parametrize("left", ["", "{", "[]", '{"user": "x"}', "\udcff"])
def test_an_incomplete_file_holds_no_lock(tmp_path, left):
    (tmp_path / LOCK_NAME).write_text(left, errors="surrogateescape")
    with locked(tmp_path, what_else=ELSE):
        pass


@posix
@pytest.mark.parametrize("put", ["symlink", "dangling", "hard link", "FIFO", "folder"])
def test_what_stands_in_the_place_of_a_lock_is_not_written_to(tmp_path, put):
    folder, theirs = tmp_path / "run", tmp_path / "theirs"
    folder.mkdir()
    lock = folder / LOCK_NAME
    if put != "dangling":
        theirs.write_bytes(b"precious")
    make = {"hard link": lambda: lock.hardlink_to(theirs), "FIFO": lambda: os.mkfifo(lock), "folder": lock.mkdir}
    make.get(put, lambda: lock.symlink_to(theirs))()
    with pytest.raises(TrainingError) as caught, locked(folder, what_else=ELSE):
        pass
    assert str(caught.value).startswith(f"a lock must be a regular file, but {lock} is a link, a folder or")
    assert str(caught.value).endswith(f"Remove it and start again. {ELSE}")
    assert os.path.lexists(lock)
    assert not theirs.exists() if put == "dangling" else theirs.read_bytes() == b"precious"


@posix
class TestWhereTheSystemGivesNoLocks:
    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch):
        def refuse(*_args):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(folder_lock.fcntl, "lockf", refuse)
        monkeypatch.setattr(folder_lock, "_SETTLE", 0.01)

    def test_a_process_that_runs_holds_it(self, tmp_path, holder):
        with pytest.raises(FolderInUseError, match=f"process {holder.pid} of"), locked(tmp_path, what_else=ELSE):
            pass

    def test_one_that_ended_does_not(self, tmp_path, holder):
        holder.kill()
        deadline = time.monotonic() + 30
        while folder_lock._is_running(holder.pid):  # it was not waited for yet, so its id is still in use
            assert time.monotonic() < deadline
        logged = []
        with locked(tmp_path, log=logged.append, what_else=ELSE):
            pass
        assert len(logged) == 1 and not (tmp_path / LOCK_NAME).exists()

    def test_nor_does_another_process_with_its_id(self, tmp_path, holder):
        found = json.loads((tmp_path / LOCK_NAME).read_text())
        (tmp_path / LOCK_NAME).write_text(json.dumps({**found, "started": "long ago"}))
        logged = []
        with locked(tmp_path, log=logged.append, what_else=ELSE):
            pass
        assert len(logged) == 1

    def test_of_two_that_come_at_once_one_gets_it(self, tmp_path, monkeypatch):
        other = replace(Owner.here(), pid=os.getppid(), started=None)

        def overwritten(_seconds):
            (tmp_path / LOCK_NAME).write_text(json.dumps(asdict(other)))

        monkeypatch.setattr(folder_lock.time, "sleep", overwritten)
        with pytest.raises(FolderInUseError, match=f"process {os.getppid()} of"), locked(tmp_path, what_else=ELSE):
            pass

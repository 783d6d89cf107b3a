"""Whether a file is still the one that was read: no copy that keeps times passes for it."""

import os
import shutil
import time

import pytest

from finetune.core import file_state
from finetune.core.file_state import file_key, is_settled


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    return path


def overwrite(path, other):
    with path.open("r+b") as file:
        file.write(other.read_bytes())


@pytest.mark.parametrize("how", [shutil.copyfile, os.replace, lambda new, path: overwrite(path, new)])
def test_a_key_changes_with_other_bytes_of_the_same_size_and_times(path, tmp_path, how):
    first, times = file_key(path), path.stat()
    assert file_key(path) == first
    new = tmp_path / "new"
    new.write_bytes(b"new")
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    time.sleep(0.02)  # seconds; longer than a tick of the kernel's clock
    how(new, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns and file_key(path) != first


def test_a_key_changes_with_every_boot(path, monkeypatch):
    first = file_key(path)
    monkeypatch.setattr(file_state, "boot_id", lambda: "another")
    assert file_key(path) != first


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Return a function: type of file system, seconds since the last change -> whether a file there is settled."""
    path = tmp_path / "some folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"")

    def on(kind, seconds, *, point=tmp_path / "some folder"):
        mounts = tmp_path / "mounts"
        line = "22 1 8:1 / {} rw shared:1 - {} /dev/sda1 rw\n"
        mounts.write_text(line.format("/", "ext4") + line.format(str(point).replace(" ", "\\040"), kind))
        monkeypatch.setattr(file_state, "_MOUNTS", mounts)
        monkeypatch.setattr(file_state, "_RESTS_BY_DEVICE", {})
        monkeypatch.setattr(file_state.time, "time_ns", lambda: path.stat().st_ctime_ns + int(seconds * 1e9))
        return is_settled(path)

    return on


def test_a_state_is_certain_once_the_file_has_rested(on):
    assert [on("xfs", seconds) for seconds in (-5, 0, 1.9, 2.1, 1000)] == [False, False, False, True, True]
    assert [on("nfs4", seconds) for seconds in (2.1, 599, 601)] == [False, False, True], "a server has its own clock"
    assert not any(on(kind, 1e6) for kind in ("vfat", "fuse.sshfs", "cifs", "9p")), "it is not known what they keep"
    assert on("vfat", 3, point="/elsewhere")


def test_where_mounts_are_not_listed_a_file_system_is_taken_as_local(path, monkeypatch, tmp_path):
    monkeypatch.setattr(file_state, "_MOUNTS", tmp_path / "none")
    monkeypatch.setattr(file_state, "_RESTS_BY_DEVICE", {})
    assert not is_settled(path)
    monkeypatch.setattr(file_state.time, "time_ns", lambda: path.stat().st_ctime_ns + 3_000_000_000)
    assert is_settled(path)


def test_a_time_in_the_future_is_not_certain(path, monkeypatch):
    os.utime(path, (2**32, 2**32))
    monkeypatch.setattr(file_state.time, "time_ns", lambda: path.stat().st_ctime_ns + 3_000_000_000)
    assert not is_settled(path)

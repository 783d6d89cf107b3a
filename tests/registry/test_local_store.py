"""What the store in a folder does when the disk does not play along."""

import builtins
import errno
import os

import pytest

from finetune.errors import StoreError
from finetune.registry.storage.local import LocalStore
from finetune.registry.storage.store import AlreadyExists, exists
from tests.registry.faulty import Killed

KEY = "names/medical/brain/log/000000000001.json"


@pytest.fixture
def local(tmp_path):
    return LocalStore(tmp_path / "store")


def _fail(monkeypatch, name, number, target=os):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(target, name, fail)


def _get(store, key):
    with store.get(key) as file:
        return file.read()


def _keys(store, prefix=""):
    return sorted(meta.key for meta in store.list(prefix))


def _visible(store):
    return [str(path) for path in store.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("function", "number", "advice"),
    [
        (
            "fsync",
            errno.ENOSPC,
            "No space left on device. The disk is full: free some space there, or choose another",
        ),
        ("fsync", errno.EDQUOT, "Your quota is used up"),
        ("fsync", errno.EIO, "Check that the disk is connected and healthy"),
        ("mkdir", errno.EACCES, "Permission denied. Ask its owner for access, or choose another folder"),
        ("mkdir", errno.EROFS, "It is mounted read-only: choose another folder"),
        ("mkdir", errno.ENOSPC, "The disk is full"),
        ("link", errno.ENOSPC, "The disk is full"),
        ("link", errno.EACCES, "Ask its owner for access"),
    ],
)
def test_a_disk_that_refuses_is_explained_and_nothing_is_visible(monkeypatch, local, function, number, advice):
    with monkeypatch.context() as patch:
        _fail(patch, function, number)
        with pytest.raises(StoreError) as caught:
            local.put(KEY, b"data")
    assert str(caught.value).startswith(f"cannot write {local.root / KEY}: ")
    assert advice in str(caught.value)
    assert "--registry or FINETUNE_REGISTRY" in str(caught.value) or number == errno.EIO
    assert caught.value.errno == number
    assert _visible(local) == []
    local.put(KEY, b"data")
    assert _get(local, KEY) == b"data"


def test_a_file_that_cannot_be_opened_is_explained(monkeypatch, local):
    local.put(KEY, b"data")
    with monkeypatch.context() as patch:
        _fail(patch, "open", errno.EACCES, builtins)
        with pytest.raises(StoreError, match="cannot read .*000000000001.json: Permission denied. Ask its owner"):
            local.get(KEY)
        with pytest.raises(StoreError, match="cannot write .*other: Permission denied. Ask its owner"):
            local.put("a/other", b"")
    with monkeypatch.context() as patch:
        _fail(patch, "stat", errno.EACCES)
        with pytest.raises(StoreError, match="cannot read .*000000000001.json: Permission denied"):
            local.head(KEY)
    with monkeypatch.context() as patch:
        _fail(patch, "unlink", errno.EROFS)
        with pytest.raises(StoreError, match="cannot delete .*000000000001.json: Read-only file system"):
            local.delete(KEY)
    with monkeypatch.context() as patch:
        _fail(patch, "scandir", errno.EACCES)
        with pytest.raises(StoreError, match="cannot list .*store: Permission denied"):
            list(local.list())


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_refused(monkeypatch, local, number):
    _fail(monkeypatch, "link", number)
    with pytest.raises(StoreError, match="this file system has no hard links .* two writers could overwrite"):
        local.put(KEY, b"data")
    assert _visible(local) == []


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="A folder is needed, but a file has its path"):
            LocalStore(root).put(KEY, b"data")


@pytest.mark.parametrize("function", ["mkdir", "fsync", "link", "unlink"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_object_is_whole_or_absent_wherever_the_writer_dies(monkeypatch, local, function, moment):
    real, calls = getattr(os, function), 0
    for number in range(1, 20):
        calls, key = 0, f"a{number}/b/c"

        def dying(*args, number=number, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number and moment == "before":
                raise Killed
            out = real(*args, **kwargs)
            if calls == number:
                raise Killed
            return out

        with monkeypatch.context() as patch:
            patch.setattr(os, function, dying)
            try:
                local.put(key, b"whole")
            except Killed:
                pass
        assert _keys(local, f"a{number}") in ([], [key])
        if exists(local, key):
            assert _get(local, key) == b"whole"
        else:
            local.put(key, b"whole")
        if calls < number:
            break
    assert 2 <= number < 19


def test_bytes_are_synced_before_the_name_and_the_name_before_the_answer(monkeypatch, local):
    local.put("a/first", b"")
    steps = []
    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (steps.append(name), real(*args))[1])
    local.put("a/b", b"data")
    folders_up_to_the_root = ["fsync", "fsync"]
    assert steps == ["fsync", "link", *folders_up_to_the_root]
    steps.clear()
    with pytest.raises(AlreadyExists):  # its writer may have died before it was lasting
        local.put("a/b", b"data")
    assert steps == folders_up_to_the_root
    steps.clear()
    local.put("a/b", b"data", mode="overwrite")
    assert steps == ["fsync", "replace", *folders_up_to_the_root]


def test_a_file_system_that_cannot_sync_folders_is_borne(monkeypatch, local):
    real = os.fsync

    def only_files(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    local.put(KEY, b"data")
    assert _get(local, KEY) == b"data"


def test_what_a_killed_writer_leaves_is_not_listed(local):
    local.put("a/b", b"data")
    (local.root / "a" / ".tmp-0123").write_bytes(b"half")
    (local.root / ".DS_Store").write_bytes(b"")
    assert _keys(local) == ["a/b"]


def test_files_have_the_modes_of_the_umask(local):
    before = os.umask(0o027)
    try:
        local.put("a/b", b"data")
    finally:
        os.umask(before)
    assert (local.root / "a/b").stat().st_mode & 0o777 == 0o640


def test_relative_and_home_locations_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = LocalStore("here")
    monkeypatch.chdir("/")
    store.put("a/b", b"")
    assert (tmp_path / "here" / "a" / "b").exists()
    assert LocalStore("~/there").root == tmp_path / "home" / "there"

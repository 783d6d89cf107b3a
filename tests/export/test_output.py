"""A folder that appears whole or not at all, whatever happens to the process that writes it."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import ExportError, StoreError
from finetune.export.output import new_output, require_space
from finetune.registry import AdapterRegistry
from finetune.registry.storage.location import is_registry

WRITER = """
import sys, time
from pathlib import Path
from finetune.export.output import new_output
with new_output(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start(output, *, seconds=60, before=""):
    process = subprocess.Popen(
        [sys.executable, "-c", before + WRITER, str(output), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background, otherwise
    )
    assert process.stdout.readline() == "writing\n"
    return process


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_whole(tmp_path):
    with new_output(tmp_path / "deep" / "out") as folder:
        assert everything(tmp_path) == [
            "deep", "deep/.out.exporting", "deep/.out.exporting/lock", "deep/.out.exporting/new"
        ]  # fmt: skip
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text")
        (folder / "sub" / "file").chmod(0o600)  # as safetensors writes
    (tmp_path / "other").write_text("")
    assert (tmp_path / "deep" / "out" / "sub" / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "other").unlink()
    assert everything(tmp_path) == ["deep", "deep/out", "deep/out/sub", "deep/out/sub/file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError], ids=lambda e: e.__name__)
def test_nothing_after_an_error(tmp_path, error):
    with pytest.raises(error), new_output(tmp_path / "out") as folder:
        (folder / "file").write_text("text")
        raise error
    assert everything(tmp_path) == []


@pytest.mark.parametrize("call", ["os.fsync", "os.rename"])
def test_nothing_after_an_error_of_the_disk(tmp_path, monkeypatch, call):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises(StoreError, match=r"out: No space left.* choose another folder \(--output\)"):
        with new_output(tmp_path / "out") as folder:
            (folder / "file").write_text("text")
    assert everything(tmp_path) == []


def test_a_file_elsewhere_that_cannot_be_read_is_not_called_the_output(tmp_path):
    with pytest.raises(StoreError, match="^cannot read /nowhere/config.json: No such file"):
        with new_output(tmp_path / "sub" / "out"):
            open("/nowhere/config.json")
    assert everything(tmp_path) == ["sub"]


def test_a_place_where_no_folder_can_be_made_is_refused_at_once(tmp_path, monkeypatch):
    make = Path.mkdir

    def refuse(self, *args, **options):  # as the system does below /proc, or where the parent has gone
        if self.name.endswith(".exporting"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))
        make(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="cannot write .*out: No such file or directory"):
        with new_output(tmp_path / "out"):
            pass


def test_what_stands_there_is_kept(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_output(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = everything(tmp_path)
    for name in ("empty", "file", "link"):
        with pytest.raises(ExportError, match=rf"{name} holds something already. Choose .* \(--output\)"):
            with new_output(tmp_path / name):
                pytest.fail("entered")
    with pytest.raises(StoreError, match="cannot write"), new_output(tmp_path / "file" / "out"):
        pytest.fail("entered")
    with pytest.raises(ExportError, match="holds something already"), new_output(tmp_path / "late") as folder:
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "file").write_text("of another process")
    assert everything(tmp_path) == sorted([*before, "late", "late/file"])


def test_a_link_in_the_place_of_the_hidden_folder_is_not_followed(tmp_path):
    (tmp_path / "mine" / "new").mkdir(parents=True)
    (tmp_path / "mine" / "new" / "file").write_text("mine")
    hidden = tmp_path / ".out.exporting"
    hidden.symlink_to(tmp_path / "mine")
    before = everything(tmp_path)
    for _ in range(2):
        with pytest.raises(ExportError, match=r"\.out\.exporting is not a folder of a killed export .* \(--output\)"):
            with new_output(tmp_path / "out"):
                pytest.fail("entered")
        assert everything(tmp_path) == before
        hidden.unlink()
        hidden.write_text("a file")  # nor is that one
    hidden.unlink()
    hidden.mkdir()
    (hidden / "new").symlink_to(tmp_path / "mine" / "new")
    with pytest.raises(StoreError, match="cannot write .*out: File exists"), new_output(tmp_path / "out"):
        pytest.fail("entered")
    (hidden / "lock").symlink_to(tmp_path / "mine" / "lock")
    with pytest.raises(ExportError, match="is not a folder of a killed export of this user"):
        with new_output(tmp_path / "out"):
            pytest.fail("entered")
    assert everything(tmp_path / "mine") == ["new", "new/file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_another_user_left_is_not_cleared(tmp_path):
    (tmp_path / ".out.exporting" / "new").mkdir(parents=True)
    os.chown(tmp_path / ".out.exporting", 65534, -1)
    with pytest.raises(ExportError, match="is not a folder of a killed export of this user"):
        with new_output(tmp_path / "out"):
            pytest.fail("entered")
    assert everything(tmp_path) == [".out.exporting", ".out.exporting/new"]


def test_nothing_is_exported_into_a_registry(tmp_path):
    registry = AdapterRegistry(tmp_path / "registry")
    is_registry(registry.store, create=True)
    (tmp_path / "link").symlink_to(tmp_path / "registry")
    before = everything(tmp_path)
    for output in ("registry/out", "registry/names/medical/out", "link/blobs/out"):
        with pytest.raises(StoreError, match=r"out lies in the registry .*registry, which holds .* \(--output\)"):
            with new_output(tmp_path / output):
                pytest.fail("entered")
    assert everything(tmp_path) == before
    (tmp_path / "registry.json").write_text('{"name": "of some other program"}')
    with new_output(tmp_path / "out") as folder:
        (folder / "file").write_text("text")


def test_room_on_the_disk(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(ExportError, match="The export needs 1000000000.0 GB, and the disk has .* free. Make room"):
        require_space(tmp_path, 10**18)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)], ids=["SIGTERM", "SIGINT"]
)
def test_a_stopped_writer_leaves_nothing(tmp_path, signum, code):
    with start(tmp_path / "out") as process:
        process.send_signal(signum)
    assert process.returncode == code
    assert everything(tmp_path) == []


@pytest.mark.distributed
def test_what_a_killed_writer_leaves_is_cleared_by_the_next(tmp_path):
    with start(tmp_path / "out") as process:
        process.kill()
    left = [".out.exporting", ".out.exporting/lock", ".out.exporting/new", ".out.exporting/new/half"]
    assert everything(tmp_path) == left
    with new_output(tmp_path / "out") as folder:
        assert everything(folder) == []
        (folder / "file").write_text("text")
    assert everything(tmp_path) == ["out", "out/file"]


@pytest.mark.distributed
def test_two_writers_do_not_meet(tmp_path):
    with start(tmp_path / "out") as process:
        with pytest.raises(ExportError, match="another process is exporting to .*out now. Wait, or choose"):
            with new_output(tmp_path / "out"):
                pytest.fail("entered")
        with new_output(tmp_path / "other"):
            pass
        assert (tmp_path / ".out.exporting" / "new" / "half").exists(), "the first goes on"
        process.terminate()


@pytest.mark.distributed
def test_an_apps_own_handler_stays(tmp_path):
    before = "import signal; signal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))\n"
    with start(tmp_path / "out", seconds=1, before=before) as process:
        process.terminate()
        assert process.stdout.readline() == "mine\n"
    assert process.returncode == 0 and everything(tmp_path) == ["out", "out/half"]


@pytest.mark.distributed
def test_many_writers_one_after_another_each_whole_or_refused(tmp_path):
    """Five processes export to one place again and again; the folder always holds the files of one writer."""
    code = """
import os, sys
from pathlib import Path
from finetune.errors import ExportError
from finetune.export.output import new_output
made = 0
for turn in range(60):
    try:
        with new_output(Path(sys.argv[1], f"out{turn % 7}")) as folder:
            for name in "ab":
                (folder / name).write_text(str(os.getpid()))
        made += 1
    except ExportError:
        pass
print(made)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    made = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 5 and sum(made) == 7
    assert sorted(os.listdir(tmp_path)) == [f"out{i}" for i in range(7)]
    for folder in tmp_path.iterdir():
        assert (folder / "a").read_text() == (folder / "b").read_text() != ""

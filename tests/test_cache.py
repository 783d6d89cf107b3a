"""Notes of what was expensive to find out: kept in any number, by several processes, and never an error."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from finetune.cache import Notes, file_key, write_note


def test_notes_are_kept_in_any_number():
    notes = Notes("some.sqlite")
    notes.put({str(i): str(i * i) for i in range(1200)})
    assert notes.get([str(i) for i in range(2000)]) == {str(i): str(i * i) for i in range(1200)}
    notes.put({"3": "new"})
    assert Notes("some.sqlite").get(["3", "4"]) == {"3": "new", "4": "16"} and Notes("other.sqlite").get(["3"]) == {}


def test_several_processes_write_at_once():
    code = (
        "import sys; from finetune.cache import Notes\n"
        "for i in range(40): Notes('x.sqlite').put({f'{sys.argv[1]}:{i}': str(i)})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(n)], env=dict(os.environ)) for n in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    keys = [f"{n}:{i}" for n in range(4) for i in range(40)]
    assert len(Notes("x.sqlite").get(keys)) == 160


def test_a_cache_that_fails_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    (tmp_path / "torn.sqlite").write_bytes(b"no database at all" * 100)
    notes = Notes("torn.sqlite")
    notes.put({"a": "1"})
    assert notes.get(["a"]) == {}
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "torn.sqlite"))  # a file where a folder should be
    notes = Notes("x.sqlite")
    notes.put({"a": "1"})
    assert notes.get(["a"]) == {}


def test_a_key_changes_with_the_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("x")
    first = file_key(path)
    assert file_key(path) == first
    os.utime(path, ns=(1, 1))
    assert file_key(path) != first


def test_a_note_that_many_threads_write_is_one_of_theirs_and_nothing_is_left(tmp_path):
    path = tmp_path / "notes" / "note"
    texts = [f"{number}" * 5000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_note(path, text), texts * 20))
    assert path.read_text() in texts and list(path.parent.iterdir()) == [path]


def test_a_note_follows_no_link_and_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f"note.{os.getpid()}.tmp").symlink_to("mine")
    write_note(tmp_path / "note", "text")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "note").read_text() == "text"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    write_note(tmp_path / "folder", "text")
    assert sorted(tmp_path.rglob("*")) == before

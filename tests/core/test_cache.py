"""Notes of what was expensive to find out: kept in any number, by several processes, and never an error."""

import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from finetune.core.cache import Notes, cache_home, conversions_of, read_note, write_note


def test_notes_are_kept_in_any_number():
    notes = Notes("some.sqlite")
    notes.put({str(i): str(i * i) for i in range(1200)})
    assert notes.get([str(i) for i in range(2000)]) == {str(i): str(i * i) for i in range(1200)}
    notes.put({"3": "new"})
    assert Notes("some.sqlite").get(["3", "4"]) == {"3": "new", "4": "16"} and Notes("other.sqlite").get(["3"]) == {}


def test_several_processes_write_at_once():
    code = (
        "import sys; from finetune.core.cache import Notes\n"
        "for i in range(40): Notes('x.sqlite').put({f'{sys.argv[1]}:{i}': str(i)})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(n)], env=dict(os.environ)) for n in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    keys = [f"{n}:{i}" for n in range(4) for i in range(40)]
    assert len(Notes("x.sqlite").get(keys)) == 160


def test_a_cache_that_fails_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))  # a file where a folder should be
    notes = Notes("x.sqlite")
    notes.put({"a": "1"})
    assert notes.get(["a"]) == {}


def test_a_note_that_many_threads_write_is_one_of_theirs_and_nothing_is_left(tmp_path):
    path = tmp_path / "notes" / "note"
    texts = [f"{number}" * 5000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_note(path, text), texts * 20))
    assert read_note(path) in texts and list(path.parent.iterdir()) == [path]


def test_a_note_follows_no_link_and_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f"note.{os.getpid()}.tmp").symlink_to("mine")
    write_note(tmp_path / "note", "text")
    assert (tmp_path / "mine").read_text() == "mine" and read_note(tmp_path / "note") == "text"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    write_note(tmp_path / "folder", "text")
    assert sorted(tmp_path.rglob("*")) == before


DAMAGE = {
    "empty": lambda data: b"",
    "NULs": lambda data: bytes(len(data)),
    "random bytes": lambda data: bytes((i * 197 + 13) % 256 for i in range(len(data))),
    "cut short": lambda data: data[: len(data) // 2],
    "not UTF-8": lambda data: b"\xff" + data[1:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_note_is_none_and_can_be_written_again(damage):
    path = cache_home() / "some" / "note"
    write_note(path, "what was found")
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert read_note(path) is None
    write_note(path, "found again")
    assert read_note(path) == "found again"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_database_holds_no_note_and_can_be_written_again(damage):
    notes = Notes("some.sqlite")
    notes.put({str(i): "x" * 100 for i in range(1000)})
    notes.path.write_bytes(DAMAGE[damage](notes.path.read_bytes()))
    assert notes.get(["3"]) == {}
    notes.put({"3": "new"})
    assert notes.get(["3"]) == {"3": "new"}


@pytest.mark.parametrize(
    "harm", ["'other'", "x'ff00'", "replace(note, 'right', 'wrong')", "CAST(x'ff' AS TEXT)", "'right'"]
)
def test_a_row_that_was_changed_is_no_note(harm):
    notes = Notes("some.sqlite")
    notes.put({"a": "right"})
    connection = sqlite3.connect(notes.path)
    with connection:
        connection.execute(f"UPDATE notes SET note = {harm}")
    connection.close()
    assert notes.get(["a"]) == {}


def test_names_need_not_be_utf_8(tmp_path):
    name = os.fsdecode(b"\xff.png")
    notes = Notes("some.sqlite")
    notes.put({name: "1"})
    assert notes.get([name]) == {"\udcff.png": "1"}
    write_note(cache_home() / "note", name)
    assert read_note(cache_home() / "note") == name


def test_what_is_made_of_files_has_a_place_of_its_own_for_each_of_their_states(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"old")
    first, times = conversions_of([path]), path.stat()
    assert conversions_of([path]) == first
    path.write_bytes(b"new")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert conversions_of([path]) != first

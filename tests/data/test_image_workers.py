"""Images of others, decoded in processes that are killed when one takes too long."""

import os
import threading
import time

import numpy as np
import pytest

from finetune.core.example import ImageOptions
from finetune.data import image_workers as room
from finetune.data.image_checks import look_at
from finetune.data.image_workers import ImageWorkers, image_workers
from finetune.data.images import MOST_SCANS, open_image, read_pixels, read_through
from finetune.errors import ImageWorkerError, RowError
from tests.server.asking import FILES, many_scans, noise

CAP = 1_000_000


@pytest.fixture(scope="module")
def workers():
    made = ImageWorkers()
    yield made
    made.close()


def outcome(call, *args, **options):
    try:
        return call(*args, **options)
    except RowError as error:
        return str(error), error.reason


@pytest.mark.parametrize("number", range(len(FILES)))
def test_they_return_what_this_process_would(workers, number):
    data = FILES[number]
    options = {"max_pixels": CAP, "name": "x", "page": None}
    assert outcome(workers.facts, data, **options) == outcome(read_through, data, **options)
    here, there = outcome(read_pixels, data, **options), outcome(workers.pixels, data, **options)
    assert type(here) is type(there)
    if isinstance(here, np.ndarray):
        assert here.dtype == there.dtype and np.array_equal(here, there)
        assert open_image(there, options=ImageOptions()).tobytes() == open_image(data).tobytes()
    else:
        assert here == there


def test_a_file_is_read_where_it_lies(workers, tmp_path):
    path = tmp_path / "bild \u00e4.png"
    path.write_bytes(noise(5, 4))
    assert workers.facts(path, max_pixels=CAP, page=None).size == (5, 4)
    with pytest.raises(RowError, match=r"gone.png: no such file"):
        workers.facts(tmp_path / "gone.png", max_pixels=CAP, page=None)


@pytest.fixture
def slow_worker(monkeypatch):
    """Workers that take a minute for each image, and a second less for none."""
    code = "from finetune.data import image_worker as w; import time; w._answer = lambda *a: time.sleep(60)"
    monkeypatch.setattr(room, "_MAIN", room._MAIN.replace("from finetune", f"{code}; from finetune", 1))


def test_one_that_takes_too_long_is_killed_and_the_next_one_is_read(slow_worker, monkeypatch):
    workers = ImageWorkers(seconds=0.3)
    with pytest.raises(RowError, match=r"x: the image takes more than 0.3 seconds to decode. Save it as PNG"):
        workers.facts(noise(4, 4), max_pixels=CAP, name="x", page=None)
    monkeypatch.undo()
    workers.seconds = 60
    assert workers.facts(noise(4, 4), max_pixels=CAP, page=None).size == (4, 4)
    (worker,) = workers._idle
    assert workers.facts(noise(4, 4), max_pixels=CAP, page=None).size == (4, 4) and workers._idle == [worker]
    workers.close()
    assert not worker.is_alive()
    with pytest.raises(ImageWorkerError, match="must be decoded before the process exits"):
        workers.facts(noise(4, 4), max_pixels=CAP, page=None)


def test_closing_ends_what_is_being_decoded(slow_worker):
    workers, errors = ImageWorkers(), []

    def decode():
        try:
            workers.pixels(noise(4, 4), max_pixels=CAP, name="x", page=None)
        except ImageWorkerError as error:
            errors.append(error)

    thread = threading.Thread(target=decode)
    thread.start()
    while not workers._busy:
        time.sleep(0.01)
    workers.close()
    thread.join(10)
    assert errors and not thread.is_alive()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system bounds no memory")
def test_one_that_needs_too_much_memory_is_an_error(workers, monkeypatch):
    code = "from finetune.data import image_worker as w; w.SPARE_BYTES = 2**20; w.BYTES_PER_PIXEL = 1"
    monkeypatch.setattr(room, "_MAIN", room._MAIN.replace("from finetune", f"{code}; from finetune", 1))
    small = ImageWorkers()
    with pytest.raises(RowError, match="x: the image needs too much memory"):
        small.pixels(noise(2000, 2000), max_pixels=4_000_000, name="x", page=None)
    small.close()


@pytest.mark.parametrize("call", [open_image, read_through, read_pixels])
def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(call):
    assert call(many_scans(64, MOST_SCANS)) is not None
    with pytest.raises(
        RowError, match=f"x: not a readable image: a JPEG must have at most {MOST_SCANS} scans, got more"
    ):
        call(many_scans(64, MOST_SCANS + 1), name="x")


def test_what_stands_before_and_behind_the_image_is_no_scan():
    """A preview in a segment, and a film behind the image, as telephones write them."""
    data, scan = noise(8, 8, "JPEG"), b"\xff\xda"
    segment = b"\xff\xe9" + (2 + 2000).to_bytes(2, "big") + scan * 1000
    assert open_image(data[:2] + segment + data[2:] + scan * 1000).size == (8, 8)


def test_an_image_may_take_seconds_of_a_processor(monkeypatch):
    code = "from finetune.data import image_worker as w; w._answer = lambda *a: [None for _ in iter(int, 1)]"
    monkeypatch.setattr(room, "_MAIN", room._MAIN.replace("from finetune", f"{code}; from finetune", 1))
    monkeypatch.setattr(room, "DECODE_SECONDS", 0)
    workers = ImageWorkers(seconds=60)
    with pytest.raises(RowError, match="x: the image takes more than 0 seconds to decode"):
        workers.facts(noise(4, 4), max_pixels=CAP, name="x", page=None)
    workers.close()


def test_one_that_the_system_ended_while_it_was_idle_is_replaced():
    workers = ImageWorkers()
    assert workers.facts(noise(4, 4), max_pixels=CAP, page=None).size == (4, 4)
    (worker,) = workers._idle
    worker._process.kill()
    worker._process.wait()
    assert workers.facts(noise(4, 4), max_pixels=CAP, page=None).size == (4, 4)
    workers.close()


@pytest.mark.skipif(os.name != "posix", reason="there are no groups of processes")
def test_a_signal_to_our_group_is_none_for_them():
    workers = ImageWorkers()
    workers.facts(noise(4, 4), max_pixels=CAP, page=None)
    (worker,) = workers._idle
    assert os.getpgid(worker._process.pid) != os.getpgid(0)
    workers.close()


def test_training_rows_are_read_by_them(slow_worker, monkeypatch):
    monkeypatch.setattr(room, "_workers_of", lambda pid: ImageWorkers(seconds=0.3))
    (found,) = look_at([noise(4, 4)], max_pixels=CAP)
    assert isinstance(found, RowError) and "takes more than 0.3 seconds" in str(found)


def test_a_forked_process_has_workers_of_its_own():
    assert image_workers() is image_workers()
    assert room._workers_of(os.getpid()) is image_workers() is not room._workers_of(-1)

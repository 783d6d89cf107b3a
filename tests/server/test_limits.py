"""What waits, how long, and who goes away: with batches that run as long as the test wants."""

import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.server.conftest import REFS
from tests.server.serving import QUESTION, body, image_part, png, running, text_part, wait_for
from tests.server.test_refusals import error_of

FIRST, SECOND, DORA, PROMPTED = REFS


def waits(server, count):
    """Wait until so many requests are prepared and wait for a batch."""
    service = server.service
    wait_for(lambda: service.num_waiting == count == service.scheduler.num_waiting)


def test_what_comes_while_a_batch_runs_shares_the_next_one(loaded, stage):
    wanted = {ref: None for ref in (FIRST, SECOND, "base")}
    with running(loaded, REFS, max_batch=4) as server, ThreadPoolExecutor(8) as pool:
        stage.go_on(3)
        wanted = {ref: server.ask(ref) for ref in wanted}
        asked = [pool.submit(server.ask, FIRST)]
        wait_for(lambda: len(stage.batches) == 4)
        for count, ref in enumerate([SECOND, "base", FIRST, SECOND, FIRST], start=1):
            asked.append(pool.submit(server.ask, ref))
            waits(server, count)
        stage.go_on(3)
        answers = [one.result() for one in asked]
    assert answers == [wanted[ref] for ref in (FIRST, SECOND, "base", FIRST, SECOND, FIRST)]
    assert stage.batches[3:] == [[FIRST], [SECOND, None, FIRST, SECOND], [FIRST]]


def test_the_inputs_of_a_batch_share_one_bound(loaded, stage, monkeypatch):
    from finetune.server import scheduler

    monkeypatch.setattr(scheduler, "MOST_BYTES", int(2.5 * 32 * 32 * (3 * 4 + 8)))  # of pixels and their mask
    one, three = ([*[image_part(png())] * count, text_part(QUESTION)] for count in (1, 3))
    with running(loaded, REFS) as server, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.ask, "base")]
        wait_for(lambda: len(stage.batches) == 1)
        for count, question in enumerate([one, one, one, three, QUESTION, QUESTION], start=1):
            asked.append(pool.submit(server.ask, "base", question))
            waits(server, count)
        stage.go_on(100)
        assert all(answer.result() for answer in asked)
    assert [len(rows) for rows in stage.batches] == [1, 2, 1, 1, 2]


def test_who_waits_longest_leads_the_next_batch_whatever_can_share_it(loaded, stage):
    with running(loaded, REFS, max_batch=2) as server, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.ask, FIRST)]
        wait_for(lambda: len(stage.batches) == 1)
        for count, ref in enumerate([FIRST, DORA, SECOND, PROMPTED, "base", DORA], start=1):
            asked.append(pool.submit(server.ask, ref))
            waits(server, count)
        stage.go_on(5)
        assert all(one.result() for one in asked)
    assert stage.batches == [[FIRST], [FIRST, SECOND], [DORA, DORA], [PROMPTED], [None]]


def test_no_client_is_passed_over_by_others_who_take_turns(loaded, stage):
    """One client's adapter shares with none; two others ask again as soon as they are answered."""
    keys = [f"key-of-client-{name}" for name in "abc"]
    first, second, third = ({"Authorization": f"Bearer {key}"} for key in keys)
    with running(loaded, REFS, max_batch=1, api_keys=tuple(keys)) as server, ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(server.post, body(DORA), headers=first)]
        wait_for(lambda: len(stage.batches) == 1)
        asked.append(pool.submit(server.post, body(DORA), headers=first))
        waits(server, 1)
        for number in range(3):
            asked.append(pool.submit(server.post, body(FIRST), headers=(second, third)[number % 2]))
            waits(server, 2)
            stage.go_on()
            wait_for(lambda number=number: len(stage.batches) == number + 2)
            if stage.batches[-1] == [DORA]:
                break
        assert stage.batches[1:] == [[FIRST], [DORA]]
        stage.go_on(100)
        assert all(one.result().status_code == 200 for one in asked)


def test_a_full_queue_refuses_with_a_retry_time(loaded, stage):
    with running(loaded, REFS, max_queue=2, max_batch=1) as server, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.ask, FIRST)]
        wait_for(lambda: len(stage.batches) == 1)
        asked += [pool.submit(server.ask, FIRST) for _ in range(2)]
        waits(server, 2)
        response = server.post(body(FIRST, question="a" * 1_000_000))
        assert error_of(response)[:2] == (429, "queue_full") and response.headers["retry-after"] == "1"
        with server.client() as client, pytest.raises(openai.RateLimitError, match="full: 2 requests wait already"):
            client.chat.completions.create(**body(SECOND), stream=True)
        stage.go_on(3)
        assert len({one.result() for one in asked}) == 1
        stage.go_on()
        assert server.ask(FIRST) == asked[0].result()  # there is room again


def test_the_official_client_tries_again_by_itself(loaded, stage):
    with running(loaded, REFS, max_queue=1, max_batch=1) as server, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.ask, FIRST)]
        wait_for(lambda: len(stage.batches) == 1)
        asked.append(pool.submit(server.ask, FIRST))
        waits(server, 1)
        stage.go_on(10)
        with server.client(max_retries=5) as client:
            assert client.chat.completions.create(**body(FIRST)).choices[0].message.content == asked[0].result()


def test_a_request_that_waits_too_long_gets_an_error(loaded, stage):
    with running(loaded, REFS, queue_seconds=0.2, max_batch=1) as server, ThreadPoolExecutor(8) as pool:
        asked = pool.submit(server.ask, FIRST)
        wait_for(lambda: len(stage.batches) == 1)
        for stream in (False, True):
            response = server.post(body(SECOND, stream=stream))
            assert error_of(response)[:2] == (503, "queue_timeout") and "retry-after" in response.headers
        assert server.service.num_waiting == 0
        stage.go_on()
        assert asked.result()
    assert stage.batches == [[FIRST]]  # what was given up is not answered


def test_a_request_that_takes_too_long_gets_an_error_and_its_row_ends(loaded, stage):
    with running(loaded, REFS, request_seconds=0.3) as server:
        for number, stream in enumerate((False, True), start=1):
            assert error_of(server.post(body(FIRST, stream=stream)))[:2] == (504, "timeout")
            wait_for(lambda number=number: len(stage.batches) == number and stage.stopped == [0])
            stage.stopped = []


def test_a_stream_that_takes_too_long_ends_with_an_error_event(loaded, monkeypatch):
    from finetune.tasks import generation

    taken = threading.Event()

    def slow(self, row, token, take=generation._Rows._take):
        take(self, row, token)
        if len(self._texts[row].ids) >= 8:
            taken.wait(5)

    monkeypatch.setattr(generation._Rows, "_take", slow)
    with running(loaded, REFS, request_seconds=0.5) as server:
        events = server.post(body(FIRST, stream=True)).text.split("\n\n")
        taken.set()
    assert '"content"' in events[1] and '"code":"timeout"' in events[-2] and events[-1] == ""
    assert "[DONE]" not in events[-2]


def gone(metrics):
    return metrics.cancelled._value.get()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_ends_its_row_alone(loaded, stage, stream):
    with running(loaded, REFS, max_batch=2) as server, ThreadPoolExecutor(8) as pool:
        stage.go_on()
        wanted = server.ask(SECOND)
        first = pool.submit(server.ask, SECOND)
        wait_for(lambda: len(stage.batches) == 2)
        with pytest.raises(httpx.ReadTimeout):  # one that goes while it waits
            server.post(body(FIRST, stream=stream), timeout=0.2)
        waits(server, 0)
        second = pool.submit(server.ask, SECOND)
        waits(server, 1)
        leaving = httpx.Client(base_url=server.url, timeout=1.0, verify=False, trust_env=False)
        third = pool.submit(leaving.post, "/v1/chat/completions", json=body(FIRST, stream=stream))
        waits(server, 2)
        stage.go_on()
        wait_for(lambda: stage.batches[2:] == [[SECOND, FIRST]])
        with pytest.raises(httpx.ReadTimeout):  # one that goes while it is answered
            third.result()
        wait_for(lambda: stage.stopped == [1])
        stage.go_on()
        assert first.result() == second.result() == wanted
        wait_for(lambda: gone(server.service.metrics) == 2)
        leaving.close()
    assert not loaded.switcher._cache._uses  # nothing is kept for who has gone


@pytest.mark.parametrize("half", ["", "{"], ids=["no body", "half a body"])
def test_a_client_that_goes_away_before_its_body_has_come_is_no_error(loaded, half, caplog):
    with running(loaded, REFS) as server:
        port = httpx.URL(server.url).port
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            "Content-Length: 100\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall((head + half).encode())
            wait_for(lambda: server.service.num_waiting == 1)
        wait_for(lambda: gone(server.service.metrics) == 1)
        assert 'finetune_requests_total{adapter="unknown",status="499"} 1.0' in server.service.metrics.text().decode()
        assert server.ask(FIRST)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_stream_whose_reader_goes_away_ends(loaded, monkeypatch):
    from finetune.tasks import generation

    monkeypatch.setattr(generation._Rows, "_take", _slowly(generation._Rows._take))
    with running(loaded, REFS, max_new_tokens=200) as server, server.client() as client:
        for _ in range(2):
            stream = client.chat.completions.create(**body(FIRST), stream=True, max_tokens=200)
            next(iter(stream))
            stream.close()
        wait_for(lambda: gone(server.service.metrics) == 2)
        made = server.service.metrics.tokens.labels(FIRST, "completion")._value.get
        wait_for(lambda: made() > 0)
        assert made() < 300
        assert server.ask(SECOND)


def _slowly(take):
    def slow(self, row, token):
        threading.Event().wait(0.01)
        take(self, row, token)

    return slow


def test_a_row_that_cannot_be_put_to_the_model_fails_alone(loaded, stage, monkeypatch):
    from finetune.server import preparation

    row_inputs = preparation.row_inputs

    def faulty(collator, examples, loaded_adapters):
        if any("poison" in str(example.messages) for example in examples):
            raise MemoryError("poison")
        return row_inputs(collator, examples, loaded_adapters)

    monkeypatch.setattr(preparation, "row_inputs", faulty)
    with running(loaded, REFS) as server, ThreadPoolExecutor(8) as pool:
        stage.go_on()
        wanted = server.ask(FIRST)
        asked = [pool.submit(server.ask, FIRST)]
        wait_for(lambda: len(stage.batches) == 2)
        questions = ["What color is it?", "poison", "red " * 300, "What color is it?"]
        for count, question in zip((1, 1, 1, 2), questions, strict=True):
            asked.append(pool.submit(server.post, body(FIRST, question=question)))
            waits(server, count)
        stage.go_on(2)
        good, poisoned, long, also_good = (one.result() for one in asked[1:])
    assert error_of(poisoned)[:2] == (500, "internal_error")
    assert error_of(long)[:2] == (400, "context_length_exceeded")
    assert [one.json()["choices"][0]["message"]["content"] for one in (good, also_good)] == [wanted] * 2
    assert stage.batches[2] == [FIRST, FIRST]


def test_a_batch_that_is_too_much_is_answered_row_by_row(loaded, stage, caplog):
    with running(loaded, REFS) as server, ThreadPoolExecutor(8) as pool:
        stage.go_on()
        wanted = server.ask(FIRST)
        asked = [pool.submit(server.ask, FIRST)]
        wait_for(lambda: len(stage.batches) == 2)
        for count in (1, 2, 3):
            asked.append(pool.submit(server.ask, FIRST))
            waits(server, count)
        stage.go_on()
        wait_for(lambda: len(stage.batches) == 3)
        stage.fails = [RuntimeError("out of memory")]
        stage.go_on(4)
        assert [one.result() for one in asked] == [wanted] * 4
    assert [len(rows) for rows in stage.batches] == [1, 1, 3, 1, 1, 1]
    assert "a batch of 3 rows failed, so each row is answered alone: out of memory" in caplog.text


@pytest.mark.parametrize("stop", ["first", "held"])
def test_a_row_that_is_answered_once_more_begins_anew(loaded, monkeypatch, stop):
    from finetune.server import scheduler

    answer_batch, failed = scheduler.answer_batch, threading.Event()
    began, go_on = threading.Event(), threading.Event()

    def fails_late(switcher, batch, loaded_adapters, *, on_text, **more):
        if not began.is_set():
            began.set()
            go_on.wait(30)
        elif len(loaded_adapters) > 1 and not failed.is_set():
            for row in range(len(loaded_adapters)):
                on_text(row, whole[:1])  # which is the stop text, or may be its beginning
            failed.set()
            raise RuntimeError("out of memory")
        return answer_batch(switcher, batch, loaded_adapters, on_text=on_text, **more)

    with running(loaded, REFS, request_seconds=20) as server, ThreadPoolExecutor(4) as pool:
        whole = server.ask(FIRST)
        options = {"stop": whole[0] if stop == "first" else whole[0] + "never said"}
        monkeypatch.setattr(scheduler, "answer_batch", fails_late)
        leading = pool.submit(server.ask, FIRST)
        assert began.wait(30)
        asked = [pool.submit(server.ask, FIRST, **options) for _ in range(2)]
        waits(server, 2)
        go_on.set()
        assert leading.result() == whole
        assert [one.result() for one in asked] == ["" if stop == "first" else whole] * 2
    assert failed.is_set()


def test_a_server_that_stops_is_not_ready(loaded):
    with running(loaded, REFS) as server:
        server.service.is_stopping = True
        assert error_of(server.get("/ready"))[:2] == (503, "stopping")
        assert server.get("/health").status_code == 200
        response = server.post(body())
        assert error_of(response)[:2] == (503, "stopping") and "retry-after" in response.headers
        server.service.is_stopping = False
        server.service.scheduler.close(10)
        assert error_of(server.get("/ready"))[:2] == (503, "not_ready")


@pytest.mark.parametrize("patience, signals", [(0.3, 1), (600, 2)], ids=["late", "again"])
def test_what_does_not_end_in_time_gets_an_error_and_a_second_signal_does_not_wait(
    loaded, stage, capfd, patience, signals
):
    with running(loaded, REFS, stop_seconds=patience, max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.post, body(FIRST, stream=stream)) for stream in (False, True)]
        wait_for(lambda: len(stage.batches) == 1 and server.service.num_waiting == 1)
        for _ in range(signals):
            server.server.stop(signal.SIGTERM)
            wait_for(lambda: server.server._loop is not None)
        assert [error_of(one.result())[:2] for one in asked] == [(503, "stopping")] * 2
    assert server.server.signum == signal.SIGTERM


def test_what_runs_may_end_when_the_server_is_stopped(loaded, stage, capfd):
    with running(loaded, REFS, stop_seconds=600) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, body(FIRST, stream=True))
        wait_for(lambda: len(stage.batches) == 1)
        server.server.stop(signal.SIGTERM)
        wait_for(lambda: "stopping: 1 requests may end within 600 s" in capfd.readouterr().err)
        stage.go_on()
        assert asked.result().text.endswith("data: [DONE]\n\n")

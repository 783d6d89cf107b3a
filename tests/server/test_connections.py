"""Connections that say nothing, or too slowly, or are too many; and what is left of them when the server stops."""

import asyncio
import contextlib
import gc
import http.client
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from finetune.server.connections import SPARE_FILES, QuietErrors, _free_files, _Protocol
from tests.server.asking import many_scans
from tests.server.serving import body, http_client, image_part, png, running, text_part, wait_for
from tests.server.test_refusals import error_of


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def ended(connection):
    """Return what came until the other side closed the connection."""
    received = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def status_of(connection):
    """Return the status of one answer, after all of its body has come."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def test_a_head_that_does_not_come_ends_the_connection(vlm):
    with running(vlm, head_seconds=0.3) as server:
        silent, half = connect(server.url), connect(server.url)
        half.sendall(HALF)
        assert ended(silent) == ended(half) == b""
        after_one = connect(server.url)
        after_one.sendall(HALF + b"\r\n" + HALF)  # the second head never ends
        with after_one:
            assert after_one.recv(65536).startswith(b"HTTP/1.1 200")
        assert server.get("/health").status_code == 200


def test_a_half_head_behind_a_request_gets_no_more_time(vlm):
    with running(vlm, head_seconds=0.3) as server, connect(server.url) as both:
        both.sendall(HALF + b"\r\n" + HALF)  # in one segment
        begun = time.monotonic()
        assert ended(both).startswith(b"HTTP/1.1 200") and time.monotonic() - begun < 5


def test_an_invalid_chunk_after_the_answer_ends_the_connection(vlm):
    head = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with running(vlm, max_connections=1) as server:
        with connect(server.url) as invalid:
            invalid.sendall(head + b"4000\r\n" + b"x" * 0x4000 + b"\r\n" + b"zz\r\n" * 5000)
            assert ended(invalid).startswith(b"HTTP/1.1 404")

        def there_is_room():
            with connect(server.url) as other:
                other.sendall(HALF + b"Connection: close\r\n\r\n")
                return ended(other).startswith(b"HTTP/1.1 200")

        wait_for(there_is_room)


def test_a_connection_that_was_reset_leaves_no_timer(vlm):
    def closed_ones_with_a_timer():
        timers = [one for one in gc.get_objects() if type(one) is asyncio.TimerHandle and not one.cancelled()]
        owners = [getattr(timer._callback, "__self__", None) for timer in timers]
        return [one for one in owners if isinstance(one, _Protocol) and one.transport.is_closing()]

    with running(vlm) as server:
        for _ in range(5):
            with connect(server.url) as client:
                client.sendall(HALF + b"\r\n")
                assert status_of(client) == 200
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
        time.sleep(0.5)  # the server notices the resets
        assert not closed_ones_with_a_timer()


def test_a_head_that_drips_in_gets_no_more_time(vlm):
    with running(vlm, head_seconds=0.4) as server, connect(server.url) as slow:
        begun = time.monotonic()
        with pytest.raises(OSError):
            for letter in HALF * 10:
                slow.sendall(bytes([letter]))
                time.sleep(0.05)
        assert time.monotonic() - begun < 5


def test_an_idle_connection_outlives_the_pools_of_clients(vlm):
    with running(vlm, head_seconds=0.3) as server, connect(server.url) as idle, connect(server.url) as refused:
        asked, unknown = HALF + b"\r\n", b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"
        for connection, request, status in ((idle, asked, 200), (refused, unknown, 404)):
            connection.sendall(request)
            assert status_of(connection) == status
        refused.sendall(b"body")  # after its answer
        time.sleep(5.5)  # httpx, and so the client of OpenAI, uses a connection again for 5 s
        for connection in (idle, refused):
            connection.sendall(asked)
            assert status_of(connection) == 200


def test_an_answer_takes_longer_than_a_head_may(loaded, stage):
    with running(loaded, head_seconds=0.2) as server:
        answer = []
        thread = threading.Thread(target=lambda: answer.append(server.ask("base")))
        thread.start()
        wait_for(lambda: stage.batches)
        time.sleep(0.5)
        stage.go_on()
        thread.join(20)
        assert answer and answer[0]


def test_a_body_that_does_not_arrive_gets_an_error(vlm):
    with running(vlm, body_seconds=0.3) as server, connect(server.url) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        response = b""
        while b"}" not in response:
            response += slow.recv(65536)
        assert response.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.3 seconds" in response
        wait_for(lambda: server.service.num_waiting == 0)


def test_a_body_in_chunks_of_one_byte_delays_no_other_request(vlm):
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = b"1\r\na\r\n" * 600_000  # some 8 s at once
    with running(vlm) as server:
        responses = []

        def send():
            with connect(server.url) as sender:
                sender.settimeout(60)
                sender.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n")
                responses.append(sender.recv(65536))

        threads = [threading.Thread(target=send) for _ in range(2)]
        for thread in threads:
            thread.start()
        longest = 0.0
        while any(thread.is_alive() for thread in threads):
            begun = time.monotonic()
            assert server.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - begun)
        assert longest < 3 and all(one.startswith(b"HTTP/1.1 400") for one in responses) and len(responses) == 2


@pytest.mark.parametrize("bound", ["max_connections", "max_address_connections"])
def test_no_more_connections_than_there_may_be(vlm, bound):
    with running(vlm, head_seconds=30, **{bound: 5}) as server:
        held = [connect(server.url) for _ in range(4)]
        assert server.get("/health").status_code == 200  # the fifth, which stays open
        late = connect(server.url)
        assert ended(late).startswith(b"HTTP/1.1 503")
        held.pop().close()

        def there_is_room():
            with connect(server.url) as again:
                again.sendall(HALF + b"Connection: close\r\n\r\n")
                return ended(again).startswith(b"HTTP/1.1 200")

        wait_for(there_is_room)
        for one in held:
            one.close()


def test_a_client_that_reads_nothing_is_let_go(vlm):
    with running(vlm, body_seconds=0.5, max_connections=1) as server, connect(server.url) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.settimeout(0.2)
        with contextlib.suppress(OSError):  # until the server reads no more either
            for _ in range(10_000):
                lazy.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")

        def there_is_room():
            with connect(server.url) as other:
                other.sendall(HALF + b"Connection: close\r\n\r\n")
                return ended(other).startswith(b"HTTP/1.1 200")

        wait_for(there_is_room)


def test_one_client_leaves_room_in_the_queue(loaded, stage):
    keys = ("first-client-key", "second-client-key")
    first, second = ({"Authorization": f"Bearer {key}"} for key in keys)
    with running(loaded, api_keys=keys, max_queue=4, max_batch=1) as server:
        codes = []

        def ask(headers):
            response = server.post(body(max_tokens=2), headers=headers)
            codes.append((headers is second, response.status_code))

        threads = [threading.Thread(target=ask, args=(first,)) for _ in range(4)]
        for count, thread in enumerate(threads):
            thread.start()
            wait_for(lambda count=count: stage.batches and server.service.num_waiting == count)
        error = server.post(body(), headers=first)
        assert error_of(error)[:2] == (429, "queue_full") and "3 of your requests wait already" in error.text
        threads.append(threading.Thread(target=ask, args=(second,)))
        threads[-1].start()
        wait_for(lambda: server.service.num_waiting == 4 == server.service.scheduler.num_waiting)
        stage.go_on(2)  # the one that runs, and the one after it
        wait_for(lambda: (True, 200) in codes)  # who came last is answered next: the others are one client's
        stage.go_on(10)
        for thread in threads:
            thread.join(20)
    assert sorted(codes) == [(False, 200)] * 4 + [(True, 200)]


def test_a_failure_to_accept_is_logged_once(caplog):
    quiet, reported = QuietErrors(), []

    class Loop:
        default_exception_handler = staticmethod(reported.append)

    for _ in range(100):
        quiet(Loop(), {"message": "socket.accept() out of system resource", "exception": OSError("too many files")})
    assert [record.getMessage() for record in caplog.records] == [
        "the server cannot accept connections: too many files"
    ]
    quiet(Loop(), {"message": "something else"})
    assert reported == [{"message": "something else"}]


def test_connections_leave_descriptors_for_all_else(monkeypatch):
    open_files = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (open_files + SPARE_FILES + 30, 4096))
    assert 25 <= _free_files() <= 35
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10, 4096))
    assert _free_files() == 1


@pytest.fixture
def process(base_folder):
    """The command, with few descriptors."""
    command = f"ulimit -n 256; exec {sys.executable} -m finetune.cli serve --base {base_folder} --port 0 --device cpu "
    command += "--stop-seconds 1 --head-seconds 60"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        lines = []
        while not (found := re.search(r"http://[\d.]+:\d+", "".join(lines))):
            line = child.stdout.readline()
            assert line, child.stderr.read()
            lines.append(line)
        yield child, found[0]
        if child.poll() is None:
            child.kill()


def test_a_server_of_few_descriptors_is_not_stopped_by_half_sent_heads_and_ends_in_time(process):
    child, url = process
    held = []
    for _ in range(300):
        connection = connect(url)
        connection.sendall(HALF)
        held.append(connection)
    for connection in held:
        connection.close()
    with http_client(base_url=url, timeout=20) as client:
        wait_for(lambda: client.get("/health").status_code == 200, 60)
        content = [
            image_part(png()),
            text_part("What color is it?"),
        ]
        assert client.post("/v1/chat/completions", json=body(question=content)).status_code == 200
    # It ends in time whatever it prepares.
    part = image_part(many_scans(4000, 90, quality=10))  # of these a few bytes take long
    statuses = []

    def ask():
        with http_client(base_url=url, timeout=60) as client:
            statuses.append(client.post("/v1/chat/completions", json=body(question=[part] * 8)).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    with http_client(base_url=url, timeout=20) as client:
        wait_for(lambda: "\nfinetune_waiting 1.0\n" in client.get("/metrics").text)
    time.sleep(0.5)  # it decodes, for longer than the server waits for its requests
    begun = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 15  # a decoder may work for 20 seconds
    thread.join(30)
    assert statuses == [503]
    assert len(child.stderr.read()) < 10_000

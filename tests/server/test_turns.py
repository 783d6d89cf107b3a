"""Threads that clients take in turn: who is next, what is never lost, what is let go at once."""

import asyncio
import threading

import pytest

from finetune.server.turns import Turns


class Gate:
    """Work that waits until it may end."""

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.end.wait(30)


async def begun(gate):
    assert await asyncio.to_thread(gate.begun.wait, 30)


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_clients_take_turns_and_one_never_has_all_threads():
    async def scenario():
        turns, order = Turns(2, name="test"), []
        gate = Gate()
        first = asyncio.ensure_future(turns.run("a", gate))
        await begun(gate)
        waiting = [asyncio.ensure_future(turns.run("a", lambda n=n: order.append(n))) for n in ("a1", "a2")]
        await asyncio.sleep(0.05)
        assert order == []  # the other thread is kept for others
        await turns.run("b", lambda: order.append("b1"))
        assert order == ["b1"]
        gate.end.set()
        await asyncio.gather(first, *waiting)
        assert order == ["b1", "a1", "a2"]

    run(scenario())


def test_results_and_errors_come_back():
    async def scenario():
        turns = Turns(2, name="test")
        assert await turns.run("a", lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            await turns.run("a", lambda: 1 / 0)
        assert await turns.run("a", lambda: 4) == 4 and not turns._running

    run(scenario())


def test_work_of_a_client_that_left_is_dropped_at_once():
    async def scenario():
        turns, gate = Turns(2, name="test"), Gate()
        first = asyncio.ensure_future(turns.run("a", gate))
        await begun(gate)
        second, third = (asyncio.ensure_future(turns.run("a", lambda: 1)) for _ in range(2))
        await asyncio.sleep(0)
        for count, waiting in ((1, second), (0, third)):
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert len(turns._waiting.get("a", ())) == count  # what it holds, as the body of a request, is free
        assert not turns._waiting
        first.cancel()  # its thread counts until it has returned
        await asyncio.gather(first, return_exceptions=True)
        assert turns._running["a"] == 1
        gate.end.set()
        assert await turns.run("a", lambda: 5) == 5

    run(scenario())


def test_a_thread_that_cannot_start_costs_no_turn(monkeypatch):
    async def scenario():
        turns = Turns(2, name="test")
        start = threading.Thread.start

        def refuse(thread):
            if thread.name == "test":
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(3):
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    await turns.run("a", lambda: 1)
        assert await turns.run("a", lambda: 1) == 1

    run(scenario())


def test_what_may_not_begin_yet_begins_when_it_may():
    async def scenario():
        allowed = set()
        turns = Turns(2, name="test", may_begin=lambda client: client in allowed)
        waiting = asyncio.ensure_future(turns.run("a", lambda: 1))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        allowed.add("a")
        turns.go_on()
        assert await waiting == 1

    run(scenario())

"""Eight adapters asked by 32 threads, by asyncio tasks and over two models at once answer as they do one by one."""

import asyncio
import threading

import pytest

from finetune.assemble.loading import load_base
from finetune.serving.loading import load
from tests.matrix import rows
from tests.serving.adapters import make_adapter

KINDS = ("lora", "wide lora", "patterns", "rslora", "dora", "prompt", "full_modules", "everything")
QUESTION = "What color is it?"
THREADS, EACH = 32, 3


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two models on one base, adapters of all kinds, and what each answers to two images."""
    from tests.tiny import FAMILIES

    folder = tmp_path_factory.mktemp("many")
    path = FAMILIES["smolvlm"](folder / "base")
    base = load_base(str(path), device="cpu")
    adapters = [make_adapter(base, kind, folder / kind, seed=n) for n, kind in enumerate(KINDS)]
    models = [load("base", base=str(path), device="cpu") for _ in range(2)]
    images = [row.images[0] for row in rows(2)]
    alone = []
    for adapter in adapters:
        with models[0].using(adapter):
            alone.append([models[0].ask(image, QUESTION) for image in images])
    assert len({tuple(answers) for answers in alone}) == len(KINDS), "no two of them would answer the same"
    return models, adapters, images, alone


def test_threads(served):
    models, adapters, images, alone = served
    barrier, wrong = threading.Barrier(THREADS), []

    def ask(number):
        barrier.wait(60)
        for turn in range(EACH):
            which, shown = (number + turn) % len(KINDS), (number + turn) % 2
            vlm = models[number % 2]
            with vlm.using(adapters[which]):
                found = "".join(vlm.stream(images[shown], QUESTION)) if turn else vlm.ask(images[shown], QUESTION)
            if found != alone[which][shown]:
                wrong.append((KINDS[which], found))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == []
    assert all(vlm.adapter is None for vlm in models)


def test_tasks(served):
    """As the class says: each in a thread, which has the adapter of the task's block."""
    (vlm, _), adapters, images, alone = served

    async def ask(which, shown):
        with vlm.using(adapters[which]):
            await asyncio.sleep(0)  # the others enter their blocks
            return await asyncio.to_thread(vlm.ask, images[shown], QUESTION)

    async def stream(which, shown):
        with vlm.using(adapters[which]):
            pieces = vlm.stream(images[shown], QUESTION)
        found = []
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            found.append(piece)
        return "".join(found)

    async def everything():
        calls = [call(which, shown) for which in range(len(KINDS)) for shown in range(2) for call in (ask, stream)]
        return await asyncio.gather(*calls)

    wanted = [alone[which][shown] for which in range(len(KINDS)) for shown in range(2) for _ in range(2)]
    assert asyncio.run(everything()) == wanted

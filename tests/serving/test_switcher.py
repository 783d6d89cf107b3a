"""Many adapters on one base: each thread and task has its own, and loads and removals disturb no other."""

import asyncio
import threading
from contextvars import copy_context

import pytest
import torch
from transformers import StoppingCriteria

from finetune.adapters.probe import ProbeResult
from finetune.assemble.loading import load_base
from finetune.errors import AdapterError, MethodError
from finetune.methods.adapter import attach, detach
from finetune.methods.copies import CopiesUpdate
from finetune.methods.hooks import reached
from finetune.methods.lora_update import LoraUpdate
from finetune.methods.prompt_rows import PromptUpdate
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.matrix import recipe_of, rows, state
from tests.serving.adapters import KINDS, make_adapter

NEW = 6  # tokens of an answer


@pytest.fixture(scope="module", params=["smolvlm", "qwen2_5_vl"])  # the second keeps positions on the module
def served(request, tmp_path_factory):
    """A model and two adapters of each kind, not loaded."""
    from tests.tiny import FAMILIES

    folder = tmp_path_factory.mktemp("served")
    base = load_base(str(FAMILIES[request.param](folder / "base")), device="cpu")
    kinds = ("lora", "dora", "prompt", "full_modules", "everything")
    adapters = {(kind, i): make_adapter(base, kind, folder / f"{kind}-{i}", seed=i) for kind in kinds for i in range(2)}
    return VisionLanguageModel(base), adapters


@pytest.fixture
def vlm(served):
    """The model, plain and without loaded_adapters."""
    model = served[0]
    yield model
    model.use(None)
    for loaded in model.switcher.loaded_adapters:
        model.remove(loaded)
    assert not reached(model.model)


@pytest.fixture
def adapters(served):
    return served[1]


def generate(vlm, *, count=2, **options):
    """Greedy answers to rows of different lengths, as token ids and logits, of what answers here and now."""
    batch = vlm.prompt_batch(rows(count))
    made = vlm.model.generate(
        **batch.inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return made.sequences, torch.stack(made.logits)


def same(found, wanted):
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


class Pause(StoppingCriteria):
    """Stops nothing; waits once in the middle of an answer until it is let go."""

    def __init__(self):
        self.calls, self.reached, self.go = 0, threading.Event(), threading.Event()

    def __call__(self, ids, scores, **options):
        self.calls += 1
        if self.calls == NEW // 2:
            self.reached.set()
            assert self.go.wait(60)
        return torch.zeros(len(ids), dtype=torch.bool)


class Thread(threading.Thread):
    """One whose result or error comes back by ``join``."""

    def __init__(self, body):
        super().__init__(daemon=True)
        self.body, self.error = body, None

    def run(self):
        try:
            self.result = self.body()
        except BaseException as error:
            self.error = error

    def join(self, timeout=60):
        super().join(timeout)
        assert not self.is_alive()
        if self.error:
            raise self.error
        return self.result


@pytest.mark.parametrize("kind", ["lora", "dora", "prompt", "full_modules", "everything"])
def test_a_paused_answer_and_another_beside_it_are_what_each_is_alone(vlm, adapters, kind):
    before = state(vlm.model)
    names = [name for name, _ in vlm.model.named_modules()]
    alone = {}
    for i in (0, 1):
        with vlm.using(adapters[kind, i]):
            alone[i] = generate(vlm, count=2 + i)
    alone[None] = generate(vlm)
    assert not same(alone[0], alone[None])
    pause = Pause()

    def paused():
        with vlm.using(adapters[kind, 0]):
            return generate(vlm, stopping_criteria=[pause])

    def other():
        with vlm.using(adapters[kind, 1]):
            return generate(vlm, count=3)

    first = Thread(paused)
    first.start()
    assert pause.reached.wait(60)
    second = Thread(other)
    second.start()
    assert same(second.join(), alone[1])
    third = Thread(lambda: generate(vlm))
    third.start()
    assert same(third.join(), alone[None]), "a thread without a block has the plain base"
    pause.go.set()
    assert same(first.join(), alone[0])
    assert [name for name, _ in vlm.model.named_modules()] == names
    after = state(vlm.model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_tasks_have_their_own_and_hand_it_to_their_threads(vlm, adapters):
    wanted = {}
    for kind in ("lora", "prompt"):
        with vlm.using(adapters[kind, 0]):
            wanted[kind] = generate(vlm)

    async def request(kind, order):
        with vlm.using(adapters[kind, 0]):
            order.append(kind)
            await asyncio.sleep(0)  # the other one enters its block
            assert len(order) == 2
            here = generate(vlm)
            return here, await asyncio.to_thread(generate, vlm)

    async def both():
        order = []
        return await asyncio.gather(request("lora", order), request("prompt", order))

    for kind, found in zip(("lora", "prompt"), asyncio.run(both()), strict=True):
        assert all(same(one, wanted[kind]) for one in found)


def test_a_thread_that_is_given_the_context_streams_with_the_blocks_adapter(vlm, adapters):
    with vlm.using(adapters["lora", 0]):
        wanted = generate(vlm)
        context = copy_context()
        given, bare = Thread(lambda: context.run(generate, vlm)), Thread(lambda: generate(vlm))
        for thread in (given, bare):
            thread.start()
        assert same(given.join(), wanted) and not same(bare.join(), wanted)


def test_answers_stay_equal_while_others_come_and_go(vlm, adapters):
    kinds = ("lora", "everything", "dora", "full_modules", "prompt")
    with vlm.using(adapters["everything", 0]):
        wanted = generate(vlm)
    done, count = threading.Event(), 0

    def answer():
        found = []
        with vlm.using(adapters["everything", 0]):
            while not done.is_set() or not found:
                found.append(same(generate(vlm), wanted))
        return found

    thread = Thread(answer)
    thread.start()
    try:
        for i in range(50):
            loaded = vlm.add(adapters[kinds[i % len(kinds)], 1])
            assert len(vlm.switcher.loaded_adapters) == 2
            vlm.remove(loaded)
            count += 1
    finally:
        done.set()
    found = thread.join()
    assert count == 50 and all(found), f"{found.count(False)} of {len(found)} answers differ"


def test_what_is_removed_answers_to_the_end_of_its_blocks(vlm, adapters):
    folder = adapters["lora", 0]
    with vlm.using(folder):
        wanted = generate(vlm)
    with vlm.using(folder):
        loaded = vlm.adapter
        vlm.remove(folder)
        assert vlm.switcher.loaded_adapters == () and vlm.adapter is loaded
        assert same(generate(vlm), wanted)
        with pytest.raises(AdapterError, match="lora-0 must be loaded to answer, but it was removed. Add it again"):
            vlm.use(loaded)
        with vlm.switcher.holding():
            assert same(generate(vlm), wanted)
    assert not reached(vlm.model)
    with pytest.raises(AdapterError, match="lora-0 cannot be removed, because it is not loaded. Loaded adapters: none"):
        vlm.remove(folder)
    with vlm.using(folder):
        assert vlm.adapter is not loaded and same(generate(vlm), wanted)


def test_a_context_that_outlives_its_block_is_not_answered_by_the_plain_base(vlm, adapters):
    with vlm.using(adapters["lora", 0]):
        context = copy_context()
        wanted = vlm.ask(None, "What color is it?")
    assert context.run(vlm.ask, None, "What color is it?") == wanted
    vlm.remove(adapters["lora", 0])
    with pytest.raises(AdapterError, match="lora-0 must be loaded to answer, but it was removed"):
        context.run(vlm.ask, None, "What color is it?")


def test_what_is_used_answers_in_every_thread_and_a_block_goes_before_it(vlm, adapters):
    vlm.use(adapters["lora", 0])
    with vlm.using(adapters["lora", 1]):
        block = generate(vlm)
        thread = Thread(lambda: generate(vlm))
        thread.start()
        used = thread.join()
        vlm.use(None)
        assert same(generate(vlm), block) and not same(used, block)
    vlm.use(adapters["lora", 0])
    assert same(generate(vlm), used)
    with vlm.switcher.holding():
        vlm.use(adapters["lora", 1])
        assert same(generate(vlm), used), "what holds is not switched under its feet"
    assert same(generate(vlm), block)


def test_two_models_of_one_base_do_not_meet(vlm, adapters):
    other = VisionLanguageModel(load_base(vlm.base.path, device="cpu"))
    with vlm.using(adapters["lora", 0]):
        wanted = generate(vlm)
        with other.using(adapters["lora", 1]):
            assert same(generate(vlm), wanted) and not same(generate(other), wanted)


def test_bytes_are_counted(vlm, adapters):
    from finetune.adapters.folder import read_folder

    loaded_adapters = [vlm.add(adapters[kind, 0]) for kind in ("lora", "prompt", "full_modules")]
    for loaded, kind in zip(loaded_adapters, ("lora", "prompt", "full_modules"), strict=True):
        assert loaded.num_bytes == sum(tensor.nbytes for tensor in read_folder(adapters[kind, 0]).tensors.values())
    assert vlm.switcher.num_bytes == sum(loaded.num_bytes for loaded in loaded_adapters)
    vlm.remove(loaded_adapters[0])
    assert vlm.switcher.num_bytes == loaded_adapters[1].num_bytes + loaded_adapters[2].num_bytes


def test_live_tensors_are_the_files(vlm, adapters):
    from finetune.adapters.folder import read_folder

    saved = read_folder(adapters["everything", 0]).tensors
    live = {}
    for name, update in vlm.add(adapters["everything", 0]).updates.items():
        if isinstance(update, LoraUpdate):
            prefix = f"base_model.model.{name}.lora_"
            live |= {f"{prefix}A.weight": update.down, f"{prefix}B.weight": update.up}
        elif isinstance(update, CopiesUpdate):
            live |= {f"{name}.{leaf}": copy for leaf, copy in update.copies.items()}
        elif isinstance(update, PromptUpdate):
            live["prompt_embeddings"] = update.prompt
    assert live.keys() == saved.keys() and all(torch.equal(live[name], saved[name]) for name in saved)


def test_an_adapter_that_several_threads_ask_for_is_loaded_once(vlm, adapters):
    threads = [Thread(lambda: vlm.add(adapters["lora", 0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert len({thread.join() for thread in threads}) == 1


def test_inputs_are_made_by_one_thread_at_a_time(vlm, monkeypatch):
    """Fast tokenizers keep padding on themselves: a second thread would pad the first one's rows its own way."""
    inside, most, lock = 0, [], threading.Lock()
    family = type(vlm.base.family)
    encode = family.encode

    def slow(self, *args, **options):
        nonlocal inside
        with lock:
            inside += 1
            most.append(inside)
        threading.Event().wait(0.02)
        with lock:
            inside -= 1
        return encode(self, *args, **options)

    monkeypatch.setattr(family, "encode", slow)
    threads = [Thread(lambda: vlm.prompt_batch(rows(2))), Thread(lambda: vlm.base.probe_batch(0))]
    for thread in threads:
        thread.start()
    assert [bool(thread.join()) for thread in threads] and most == [1, 1]


def test_training_and_serving_do_not_share_a_model(vlm, adapters, tmp_path):
    method = recipe_of(KINDS["lora"], vlm.base.path, tmp_path).method
    with (
        vlm.using(adapters["lora", 0]),
        pytest.raises(MethodError, match="must not carry an adapter, but has one. Load a fresh base"),
    ):
        attach(vlm.base.host, method)
    vlm.remove(adapters["lora", 0])
    attach(vlm.base.host, method)
    try:
        with pytest.raises(
            MethodError, match="finished adapters need a base without an adapter in training. Load a fresh base"
        ):
            VisionLanguageModel(vlm.base)
    finally:
        detach(vlm.model)


def test_a_warning_that_is_made_an_error_leaves_nothing(vlm, adapters, monkeypatch):
    """As every warning is in these tests."""
    monkeypatch.setattr("finetune.serving.probing.compare", lambda *args, **kwargs: ProbeResult("inconclusive", 1.0))
    with pytest.raises(UserWarning, match="its effect on the probe is below the noise"):
        vlm.add(adapters["lora", 0])
    assert vlm.switcher.loaded_adapters == () and not reached(vlm.model)

"""Streamed answers: all pieces equal the answer of ``ask``, and the thread ends with its reader."""

import gc
import threading
import time
from contextlib import ExitStack

import pytest
import torch

from finetune.assemble.loading import load_base
from finetune.errors import AdapterError, DataError, ModelError, StreamClosedError
from finetune.methods.hooks import reached
from finetune.serving.streaming import TextStream
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.matrix import rows
from tests.serving.adapters import make_adapter

QUESTION = "What color is it?"


@pytest.fixture(scope="module", params=["smolvlm", "qwen2_5_vl"])
def served(request, tmp_path_factory):
    """A model and an adapter of some kinds, not loaded."""
    from tests.tiny import FAMILIES

    folder = tmp_path_factory.mktemp("streamed")
    base = load_base(str(FAMILIES[request.param](folder / "base")), device="cpu")
    kinds = ("lora", "prompt", "everything")
    return VisionLanguageModel(base), {kind: make_adapter(base, kind, folder / kind, seed=1) for kind in kinds}


@pytest.fixture
def vlm(served):
    """The model, plain, without loaded_adapters or threads."""
    model = served[0]
    yield model
    assert not [thread for thread in threading.enumerate() if thread.name == "finetune-stream"]
    model.use(None)
    for loaded in model.switcher.loaded_adapters:
        model.remove(loaded)
    assert not reached(model.model)


@pytest.fixture
def adapters(served):
    return served[1]


def image():
    return rows(1)[0].images[0]


@pytest.mark.parametrize("kind", ["lora", "prompt", "everything", None])
def test_the_pieces_are_the_answer(vlm, adapters, kind):
    with vlm.using(adapters[kind] if kind else None):
        wanted = vlm.ask(image(), QUESTION)
        found = list(vlm.stream(image(), QUESTION))
    assert len(found) > 1 and all(found) and "".join(found) == wanted


def test_a_conversation_streams(vlm, adapters):
    shown = [{"type": "image", "image": image()}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": "red"}]
    messages.append({"role": "user", "content": "Are you sure?"})
    with vlm.using(adapters["lora"]):
        assert "".join(vlm.stream_chat(messages)) == vlm.chat(messages)


def test_the_adapter_answers_to_the_end_though_its_block_is_over_and_it_was_removed(vlm, adapters):
    with vlm.using(adapters["lora"]):
        wanted = vlm.ask(image(), QUESTION)
        stream = vlm.stream(image(), QUESTION)
        vlm.remove(adapters["lora"])
    assert vlm.adapter is None
    assert "".join(stream) == wanted


def test_reading_changes_nobodys_adapter(vlm, adapters):
    """A generator that set it between two pieces would, in the reader's own context."""
    with vlm.using(adapters["lora"]):
        stream = vlm.stream(image(), QUESTION)
    plain = vlm.ask(image(), QUESTION)
    for _ in stream:
        assert vlm.adapter is None
    assert vlm.ask(image(), QUESTION) == plain


def test_streams_of_several_adapters_at_once(vlm, adapters):
    wanted, streams = {}, {}
    for kind, adapter in adapters.items():
        with vlm.using(adapter):
            wanted[kind] = vlm.ask(image(), QUESTION)
            streams[kind] = vlm.stream(image(), QUESTION)
    found = {kind: "" for kind in streams}
    while streams:
        for kind, stream in list(streams.items()):
            piece = next(stream, None)
            if piece is None:
                del streams[kind]
            else:
                found[kind] += piece
    assert found == wanted


@pytest.fixture
def slow(vlm, monkeypatch):
    """Make every step of an answer wait until it is let go on; count them."""
    steps = threading.Semaphore(0)
    taken = []
    generate = vlm.model.generate

    def generate_slowly(stopping_criteria, **inputs):
        def wait(ids, scores):
            taken.append(ids.shape)
            assert steps.acquire(timeout=60)
            return torch.zeros(len(ids), dtype=torch.bool)

        return generate(stopping_criteria=[wait, *stopping_criteria], **inputs)

    monkeypatch.setattr(vlm.model, "generate", generate_slowly, raising=False)
    return steps, taken


def test_a_stream_that_is_closed_ends_its_thread(vlm, adapters, slow):
    steps, taken = slow
    with vlm.using(adapters["lora"]):
        stream = vlm.stream(image(), QUESTION)
    steps.release(4)
    assert next(stream)
    threading.Timer(0.05, steps.release, [50]).start()
    stream.close()
    assert not stream._thread.is_alive() and len(taken) < 16  # steps of a whole answer
    with pytest.raises(StreamClosedError, match="closed before its end, so the answer is incomplete. Ask again"):
        next(stream)
    stream.close()
    vlm.remove(adapters["lora"])
    assert not reached(vlm.model), "its adapter was let go"


def test_leaving_the_block_closes(vlm, slow):
    steps, taken = slow
    with vlm.stream(image(), QUESTION) as stream:
        steps.release(50)
        next(stream)
    assert not stream._thread.is_alive()


def test_a_stream_without_a_reference_ends(vlm, slow):
    steps, taken = slow
    stream = vlm.stream(image(), QUESTION)
    thread = stream._thread
    del stream
    gc.collect()
    steps.release(2)
    thread.join(60)
    assert not thread.is_alive() and len(taken) < 16


def test_a_waiting_reader_gets_an_error_on_close(vlm, slow):
    steps, _ = slow
    stream = vlm.stream(image(), QUESTION)
    found = []

    def read():
        try:
            next(stream)
        except StreamClosedError as error:
            found.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.05)
    threading.Timer(0.05, steps.release, [50]).start()
    stream.close()
    reader.join(60)
    assert len(found) == 1


def test_what_goes_wrong_reaches_the_reader(vlm, adapters, monkeypatch):
    with vlm.using(adapters["lora"]):
        monkeypatch.setattr(vlm.model, "generate", lambda **options: 1 / 0, raising=False)
        stream = vlm.stream(image(), QUESTION)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            next(stream)
    monkeypatch.undo()
    vlm.remove(adapters["lora"])
    assert not reached(vlm.model)


def test_what_cannot_be_asked_is_refused_at_once(vlm, tmp_path):
    with pytest.raises(DataError, match="an image must be a path, bytes, .* got builtins.int"):
        vlm.stream(3, QUESTION)
    with pytest.raises(DataError, match="the last message must have role user, got assistant"):
        vlm.stream_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    stream = vlm.stream(tmp_path / "no.png", QUESTION)
    with pytest.raises(DataError, match="no.png: no such file"):
        list(stream)


def test_an_adapter_that_is_gone_cannot_begin(vlm, adapters):
    from contextvars import copy_context

    with vlm.using(adapters["lora"]):
        context = copy_context()
    vlm.remove(adapters["lora"])
    with pytest.raises(AdapterError, match="must be loaded to answer, but it was removed"):
        context.run(vlm.stream, image(), QUESTION)


def test_a_dual_encoder_streams_nothing(tiny_clip):
    vlm = VisionLanguageModel(load_base(str(tiny_clip), device="cpu"))
    with pytest.raises(
        ModelError, match=r"stream\(image, question\) does not support task contrastive on a clip base. Use classify"
    ):
        vlm.stream(image(), QUESTION)


def test_the_end_stays_the_end():
    stream = TextStream(lambda on_text, is_stopped: on_text(0, "a"), ExitStack())
    assert list(stream) == ["a"] and list(stream) == []
    stream.close()
    assert list(stream) == []


def test_ctrl_c_while_it_is_read_ends_it(monkeypatch):
    let_go, stopped = threading.Event(), []

    def generate(on_text, is_stopped):
        assert let_go.wait(60)
        stopped.append(is_stopped(0))

    stream = TextStream(generate, ExitStack())
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_pieces", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    let_go.set()
    stream._thread.join(60)
    assert stopped == [True]


class Interrupted:
    def get(self):
        raise KeyboardInterrupt


def test_where_no_thread_is_to_be_had_nothing_is_kept(monkeypatch):
    let_go = []
    kept = ExitStack()
    kept.callback(let_go.append, True)

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        TextStream(lambda on_text, is_stopped: None, kept)
    assert let_go == [True]

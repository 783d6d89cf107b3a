"""A batch whose rows are answered by different adapters says what each would say alone."""

import pytest
import torch

from finetune.assemble.loading import load_base
from finetune.core.example import Example, answer, as_images, ask
from finetune.errors import AdapterError, DataError, RowError
from finetune.methods.hooks import reached
from finetune.serving.batching import answer_rows, section_for
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.matrix import rows
from tests.serving.adapters import make_adapter

MIXED = ["lora-0", None, "wide lora-1", "lora-1", "lora-0"]


@pytest.fixture(scope="module")
def served(tiny_family, tmp_path_factory):
    """A model, and adapters by kind and seed, loaded."""
    folder = tmp_path_factory.mktemp("together")
    base = load_base(str(tiny_family), device="cpu")
    vlm = VisionLanguageModel(base)
    kinds = [("lora", 0), ("lora", 1), ("wide lora", 1)]
    made = {f"{kind}-{i}": make_adapter(base, kind, folder / f"{kind}-{i}", seed=i) for kind, i in kinds}
    return vlm, {name: vlm.add(folder) for name, folder in made.items()}


def images_per_row(counts):
    """Rows with so many images each."""
    shown = [image for row in rows(4) for image in row.images]
    return [
        Example(
            id=str(i),
            messages=[*ask("Is it red or blue?" if i % 2 else "What?", num_images=n), answer("red")],
            media=as_images(shown[i % 2 : i % 2 + n]),
            answers=["red"],
        )
        for i, n in enumerate(counts)
    ]


@torch.inference_mode()
def logits(vlm, batch):
    return vlm.base.family.outputs(vlm.model, batch.inputs)


def test_every_row_has_the_logits_of_its_own_adapter(served):
    vlm, loaded_adapters = served
    batch = vlm.prompt_batch(images_per_row([2, 0, 1, 0, 1])).to(vlm.model.device, vlm.model.dtype)
    refs = [loaded_adapters[name] if name else None for name in MIXED]
    with vlm.switcher.mixing(refs):
        found = logits(vlm, batch)
    expected = []
    for row, ref in enumerate(refs):
        with vlm.using(ref):
            wanted = logits(vlm, batch)[row]
        # Another order of sums, which each CPU rounds in its own way; another adapter is off by as much as it is large.
        assert (found[row] - wanted).abs().max() <= 1e-4 * wanted.abs().max(), row
        expected.append(wanted)
    assert len({one[-1].sum().item() for one in expected}) == len(expected)  # no two rows would say the same


def test_beams_of_a_row_have_its_adapter(served):
    vlm, loaded_adapters = served
    batch = vlm.prompt_batch(images_per_row([1, 1, 1])).to(vlm.model.device, vlm.model.dtype)
    refs = [loaded_adapters["lora-0"], loaded_adapters["wide lora-1"], None]

    def beams():
        return vlm.model.generate(**batch.inputs, max_new_tokens=4, min_new_tokens=4, num_beams=3, do_sample=False)

    with vlm.switcher.mixing(refs):
        found = beams()
    for row, ref in enumerate(refs):
        with vlm.using(ref):
            assert torch.equal(beams()[row], found[row])


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """A small model with an adapter of each kind; none is loaded."""
    from tests.tiny import FAMILIES

    folder = tmp_path_factory.mktemp("kinds")
    base = load_base(str(FAMILIES["smolvlm"](folder / "base")), device="cpu")
    kinds = ["lora", "wide lora", "patterns", "dora", "prompt", "full_modules", "everything"]
    return VisionLanguageModel(base), [make_adapter(base, kind, folder / kind, seed=1, name=kind[:4]) for kind in kinds]


def test_rows_of_a_batch_are_answered_as_alone(every_kind, monkeypatch):
    vlm, adapters = every_kind
    refs = [*adapters, None, *adapters[:2]]
    images = [row.images[0] for row in rows(len(refs))]
    images[3], images[8] = None, [images[8], images[1]]
    questions = ["What color is it?", "Is it red or blue?"] * len(refs)
    alone = []
    for ref, image, question in zip(refs, images, questions, strict=False):
        with vlm.using(ref):
            alone.append(vlm.ask(image, question))
    sizes = []
    generate = vlm.model.generate
    monkeypatch.setattr(
        vlm.model, "generate", lambda **kw: sizes.append(len(kw["input_ids"])) or generate(**kw), raising=False
    )
    assert vlm.ask_batch(images, questions[: len(refs)], adapters=refs) == alone
    assert sizes == [5, 1, 1, 1, 1, 1], "LoRA on the language tower and the base share; the others do not"
    assert vlm.adapter is None
    with vlm.using(adapters[4]):
        assert vlm.ask_batch(images[:1], questions[:1])[0] == vlm.ask(images[0], questions[0])


def test_what_is_removed_meanwhile_still_answers(every_kind, monkeypatch):
    vlm, adapters = every_kind
    loaded_adapters = [vlm.add(adapters[0]), vlm.add(adapters[3])]  # which do not share a batch
    alone = [vlm.ask_batch([None], ["What?"], adapters=[one])[0] for one in loaded_adapters]
    prepare = vlm.base.collator.prompt_batch

    def remove(examples):
        if loaded_adapters[1] in vlm.switcher.loaded_adapters:
            vlm.remove(loaded_adapters[1])
        return prepare(examples)

    monkeypatch.setattr(vlm.base.collator, "prompt_batch", remove, raising=False)
    assert vlm.ask_batch([None] * 2, ["What?"] * 2, adapters=loaded_adapters) == alone


def test_answers_of_other_lengths_share(every_kind, monkeypatch):
    vlm, adapters = every_kind
    short, long = (vlm.add(adapter) for adapter in adapters[:2])
    object.__setattr__(short.manifest.task, "max_new_tokens", 3)
    loaded_adapters = [short, long, short]
    alone = [vlm.ask_batch([None], ["What?"], adapters=[one])[0] for one in loaded_adapters]
    assert alone[0] != alone[1]
    limits = []
    generate = vlm.model.generate
    monkeypatch.setattr(
        vlm.model, "generate", lambda **kw: limits.append(kw["max_new_tokens"]) or generate(**kw), raising=False
    )
    assert vlm.ask_batch([None] * 3, ["What?"] * 3, adapters=loaded_adapters) == alone
    assert limits == [16]
    vlm.remove(short)


def test_pieces_and_stops_belong_to_their_rows_also_where_these_do_not_share(every_kind):
    vlm, adapters = every_kind
    loaded_adapters = [vlm.add(adapters[3]), None, vlm.add(adapters[0]), vlm.add(adapters[3])]
    sections = [section_for(vlm.switcher, loaded) for loaded in loaded_adapters]
    examples = [
        Example(id="0", messages=[*section.ask("What?", num_images=0), answer("")], media=(), answers=[""])
        for section in sections
    ]
    pieces, asked = [""] * 4, [0] * 4

    def on_text(row, piece):
        pieces[row] += piece

    def is_stopped(row):
        asked[row] += 1
        return row == 3

    whole = answer_rows(vlm.switcher, examples, loaded_adapters)
    found = answer_rows(
        vlm.switcher,
        examples,
        loaded_adapters,
        max_new_tokens=[None, 4, 2, None],
        on_text=on_text,
        is_stopped=is_stopped,
    )
    assert [one.completion_tokens for one in found] == [16, 4, 2, 1]
    assert asked == [15, 3, 1, 1]
    assert pieces == [one.text for one in found]
    assert found[0] == whole[0] and whole[1].text.startswith(found[1].text.rstrip("\ufffd"))


def test_what_cannot_share_is_refused(every_kind):
    vlm, adapters = every_kind
    with pytest.raises(AdapterError, match="cannot share a batch with other adapters: only LoRA on the language tower"):
        with vlm.switcher.mixing([adapters[0], adapters[4]]):
            pass


def test_an_input_of_other_rows_is_refused(every_kind):
    vlm, adapters = every_kind
    batch = vlm.prompt_batch(rows(3))
    with vlm.switcher.mixing([adapters[0], None]):
        with pytest.raises(
            AdapterError, match=r"must get an input \[B, T, I\] for 2 rows of one adapter each, got \[3, \d+, \d+\]"
        ):
            logits(vlm, batch)


def test_lists_of_different_lengths_are_refused(every_kind):
    vlm, adapters = every_kind
    with pytest.raises(DataError, match="needs one image, .*, got 1 images, 2 questions and 2 adapters"):
        vlm.ask_batch([None], ["a", "b"], adapters=[None, None])


def test_a_broken_image_is_named_and_nothing_is_left(every_kind):
    vlm, adapters = every_kind
    with pytest.raises(RowError, match="question 1"):
        vlm.ask_batch([None, b"no image"], ["a", "b"], adapters=[adapters[0], adapters[1]])
    assert vlm.adapter is None
    for loaded in vlm.switcher.loaded_adapters:
        vlm.remove(loaded)
    assert not reached(vlm.model)

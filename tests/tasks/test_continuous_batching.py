"""Rows of a continuous batch are answered as ``generate`` answers each of them alone."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.utils import DistributedType

from finetune.assemble.batches import Batches
from finetune.assemble.loading import load_base
from finetune.core.example import Example, answer, as_images, ask
from finetune.core.prediction import Text
from finetune.evaluation.predict import BLANK, Predictor, blanked
from finetune.methods.adapter import attach
from finetune.tasks import continuous_support, slots
from finetune.tasks.cached_rows import CachedRows
from finetune.tasks.continuous_batching import grouped
from finetune.tasks.vqa import VqaConfig, VqaTask
from tests.matrix import PROMPT, recipe_of

LIMITS = [1, 7, 3, 12, 2, 5]
QUESTIONS = ["Is it red?", "Is it red or blue?", "What color is it? Say one word.", "Is it green?"]
# Families whose rows stay in fixed batches -> why.
FIXED = {
    "gemma3": "layers that do not keep all tokens in the cache",
    "paligemma": "layers that do not keep all tokens in the cache",
}


class Limited(VqaTask):
    """Rows with a limit each: random weights end no answer."""

    def limits(self, examples):
        return [LIMITS[int(example.id) % len(LIMITS)] for example in examples]


def rows():
    """Four questions about each of three images of two sizes, three without an image, and one about two images."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size + (3,), dtype=np.uint8) for size in ((40, 32), (32, 40), (40, 32))]
    shown = [[image] for image in images for _ in QUESTIONS] + [[], [], [], images[:2]]
    asked = QUESTIONS * 3 + QUESTIONS
    return [
        Example(
            id=str(i),
            messages=[*ask(question, num_images=len(of)), answer("")],
            media=as_images(of),
            answers=["x"],
        )
        for i, (question, of) in enumerate(zip(asked, shown, strict=True))
    ]


def predictor_of(base, batches=None, *, task=None, batch_size=5, **options):
    batches = batches or Batches(base.collator, None)
    return Predictor(
        model=base.model,
        task=task or Limited(VqaConfig(max_new_tokens=12), base.processor.tokenizer),
        prompt_batch=batches.prompt_batch,
        prompt_parts=batches.prompt_parts,
        batch_size=batch_size,
        **options,
    )


def alone(predictor, examples):
    """The answer of each row, by ``generate``, in a batch of its own."""
    return [predictor.task.predict(predictor.model, predictor.prompt_batch([example]))[0] for example in examples]


@pytest.fixture
def forwards(monkeypatch):
    """How many rows went through the model: whole, and after the beginning of another."""
    seen = Counter()
    prefill, after = CachedRows.prefill.__func__, CachedRows.after.__func__

    def whole(cls, model, batch):
        seen["whole"] += len(batch.examples)
        return prefill(cls, model, batch)

    def rest(cls, model, prefixes, tails, **options):
        seen["rest"] += len(tails)
        return after(cls, model, prefixes, tails, **options)

    monkeypatch.setattr(CachedRows, "prefill", classmethod(whole))
    monkeypatch.setattr(CachedRows, "after", classmethod(rest))
    monkeypatch.setattr(continuous_support, "_TRIED", continuous_support.WeakKeyDictionary())
    return seen


def test_each_family_gives_the_answers_of_generate(tiny_family, forwards):
    base, lines = load_base(str(tiny_family), device="cpu"), []
    predictor = predictor_of(base, log=lines.append)
    examples = rows()
    assert predictor(examples, title="x") == alone(predictor, examples)
    why = FIXED.get(base.identity.model_type)
    if why is None:
        assert lines == []
        # Three rows are tried first: two about one image, and another. Then each image goes through the model once.
        assert forwards == {"whole": 2 + 3 + 4, "rest": 1 + 9}
    else:
        assert len(lines) == 1 and why in lines[0] and not forwards


def test_rows_with_blank_images_run_one_image(tiny_idefics3, forwards):
    predictor = predictor_of(load_base(str(tiny_idefics3), device="cpu"))
    examples, _ = blanked(rows())
    assert sum(example.media == (BLANK,) for example in examples) == 4  # the questions of all three images are the same
    assert predictor(examples, title="x") == alone(predictor, examples)
    assert forwards == {"whole": 2 + 1 + 4, "rest": 1 + 3}


def test_rows_fill_the_prompt_of_an_adapter(tiny_fast_vlm, tmp_path, forwards):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    attachment = attach(base.host, recipe_of(PROMPT, tiny_fast_vlm, tmp_path).method)
    attachment.freeze()
    predictor = predictor_of(base, Batches(base.collator, attachment.placeholders))
    assert predictor(rows(), title="x") == alone(predictor, rows())
    assert forwards["rest"] == 1 + 9
    assert all(answer.prompt_tokens > PROMPT["num_virtual_tokens"] for answer in predictor(rows(), title="x"))


def test_a_row_ends_at_the_models_own_end(tiny_fast_vlm, monkeypatch):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    predictor = predictor_of(base, task=VqaTask(VqaConfig(max_new_tokens=12), base.processor.tokenizer))
    counted = Counter()
    for example in rows():
        inputs = base.collator.prompt_batch([example]).inputs
        made = base.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        counted.update(made[0, inputs["input_ids"].shape[1] :].tolist())
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", [token for token, _ in counted.most_common(3)])
    found = predictor(rows(), title="x")
    assert found == alone(predictor, rows())
    assert {answer.finish_reason for answer in found} >= {"stop"}


def test_a_repetition_penalty_counts(tiny_fast_vlm, monkeypatch):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    predictor = predictor_of(base)
    without = predictor(rows(), title="x")
    monkeypatch.setattr(base.model.generation_config, "repetition_penalty", 1.5)
    penalized = predictor(rows(), title="x")
    assert penalized == alone(predictor, rows()) and penalized != without


def test_a_batch_holds_no_more_rows_than_its_size(tiny_fast_vlm):
    predictor, seen = predictor_of(load_base(str(tiny_fast_vlm), device="cpu"), batch_size=3), []
    wanted = alone(predictor, rows())
    predictor.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert predictor(rows(), title="x") == wanted and max(seen) == 3


def test_slots_grow_with_the_answers(tiny_idefics3, monkeypatch, forwards):
    monkeypatch.setattr(slots, "ROOM", 2)  # columns at once, so that they move many times
    predictor = predictor_of(load_base(str(tiny_idefics3), device="cpu"))
    assert predictor(rows(), title="x") == alone(predictor, rows()) and forwards["rest"] == 1 + 9


class Shouting(Limited):
    """A task whose prediction is made of the answer."""

    def prediction(self, answer):
        return Text(text=answer.text.upper())


class Whole(Limited):
    """A task that needs the whole batch."""

    def predict(self, model, batch):
        return [Text(text=str(len(batch.examples))) for _ in batch.examples]


def test_a_task_makes_its_own_predictions_of_answers(tiny_fast_vlm, forwards):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    options = VqaConfig(max_new_tokens=12), base.processor.tokenizer
    predictor = predictor_of(base, task=Shouting(*options))
    found = predictor(rows(), title="x")
    assert found == alone(predictor, rows()) and all(type(one) is Text for one in found) and forwards["rest"]


def test_a_task_that_predicts_batches_is_given_batches(tiny_fast_vlm, forwards):
    base, lines = load_base(str(tiny_fast_vlm), device="cpu"), []
    options = VqaConfig(max_new_tokens=12), base.processor.tokenizer
    predictor = predictor_of(base, task=Whole(*options), log=lines.append)
    assert Counter(one.text for one in predictor(rows(), title="x")) == {"5": 15, "1": 1}
    predictor(rows(), title="x")
    assert lines == [
        "answers come in fixed batches, each as long as its longest answer: Whole predicts batches in its own way"
    ]
    assert not forwards


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("no_repeat_ngram_size", 2, "the generation config asks for NoRepeatNGramLogitsProcessor"),
        ("cache_implementation", "static", "the generation config sets a cache"),
    ],
)
def test_other_settings_of_generation_need_fixed_batches(tiny_fast_vlm, monkeypatch, setting, value, why):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    assert predictor_of(base).why_fixed_batches() is None
    monkeypatch.setattr(base.model.generation_config, setting, value)
    assert predictor_of(base).why_fixed_batches() == why


def test_a_sharded_base_needs_fixed_batches(tiny_fast_vlm):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP, process_index=0, num_processes=2)
    predictor = predictor_of(base, accelerator=sharded)
    why = "the base is sharded, so each process waits for the forwards of the others"
    assert predictor.why_fixed_batches() == why


def test_a_model_whose_first_rows_differ_gets_fixed_batches(tiny_fast_vlm, forwards, monkeypatch):
    """As one would whose tokens of images see the question, or whose positions are not those that were given."""
    base, lines = load_base(str(tiny_fast_vlm), device="cpu"), []
    after = CachedRows.after

    def wrong(model, prefixes, tails, **options):
        moved = [replace(prefix, position=prefix.position + 1) for prefix in prefixes]
        return after(model, moved, tails, **options)

    monkeypatch.setattr(CachedRows, "after", wrong)
    predictor = predictor_of(base, log=lines.append)
    assert predictor(rows(), title="x") == alone(predictor, rows())
    assert forwards == {"whole": 2, "rest": 1}, "tried once, with three rows"
    assert len(lines) == 1 and "the logits of FastVlmForConditionalGeneration differ by" in lines[0]


def test_processes_share_the_rows_of_an_image():
    examples = rows()
    base = SimpleNamespace(prompt_parts=lambda example: ([0], [int(example.id), 0]))
    groups = grouped(range(len(examples)), examples, base)
    assert [list(group.rows) for group in groups] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12], [13], [14], [15]
    ]  # fmt: skip

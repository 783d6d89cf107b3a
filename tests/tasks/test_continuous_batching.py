"""Rows of a continuous batch are answered as ``generate`` answers each of them alone."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from finetune.assemble.batches import Batches
from finetune.assemble.loading import load_base
from finetune.core.example import Example, answer, as_images, ask
from finetune.evaluation.predict import BLANK, Predictor, blanked
from finetune.methods.adapter import attach
from finetune.tasks import continuous_support
from finetune.tasks.cached_rows import CachedRows
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

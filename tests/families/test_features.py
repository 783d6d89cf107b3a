"""Stored features in the place of images: the same ids, the same logits, the same answers, and no tower."""

import numpy as np
import pytest
import torch

from finetune.assemble.loading import load_base
from finetune.core.example import Example, answer, as_images, ask
from finetune.data.images import open_image
from finetune.errors import ModelError

MIXED = {"one": [0], "two in a row": [1], "mixed": [0, 1, 2, 3, 4], "none": [3]}
# A product or a convolution may take another way for a batch than for one image, and rounds otherwise then: always
# in FastVLM's tower, on some CPUs in the others. A run holds stored features to no more
# (finetune/runs/frozen_features.py); those of another image are off by as much as the logits are large.
ROUNDING = 1e-4  # of the largest logit


@pytest.fixture(scope="module")
def base(tiny_family):
    return load_base(str(tiny_family), device="cpu")


@pytest.fixture(scope="module")
def mixed_rows():
    """Rows with one, two or no image, of sizes that differ."""
    rng = np.random.default_rng(0)

    def image(width, height):
        return rng.integers(0, 255, (height, width, 3), dtype=np.uint8)

    return [
        Example(
            id=str(i),
            messages=[*ask("what is it" + " then" * i, num_images=count), answer("yes no"[: 3 + i])],
            media=as_images([image(40 + 13 * i + 20 * j, 64 - 7 * i) for j in range(count)]),
            answers=["yes"],
        )
        for i, count in enumerate([1, 2, 1, 0, 1])
    ]


@pytest.fixture(scope="module")
def collator(base, mixed_rows):
    """One that has the features of every row's images, and opens none."""
    known = {
        tuple(map(id, row.images)): base.family.image_features(base.model, base.processor, base.collator.open(row))
        for row in mixed_rows
        if row.images
    }
    return base.collator.reading(lambda images: known[tuple(map(id, images))])


@pytest.fixture
def nothing_runs(base, monkeypatch):
    """Return a function after which opening an image, and running the tower or the projector, raise."""

    def forbid():
        def refuse(*args, **kwargs):
            raise AssertionError("an image was opened, or a tower ran")

        monkeypatch.setattr("finetune.data.media.open_image", refuse)
        for path in (*base.towers["vision"], *base.towers["projector"]):
            monkeypatch.setattr(base.model.get_submodule(path), "forward", refuse)

    return forbid


@pytest.mark.parametrize("which", MIXED)
def test_logits_and_answers_are_those_with_images(base, mixed_rows, collator, nothing_runs, which):
    rows = [mixed_rows[i] for i in MIXED[which]]
    task, found = base.task(base.default_task), {}
    for who, source in (("images", base.collator), ("features", collator)):
        if who == "features":
            nothing_runs()
        training, asked = source.training_batch(rows), source.prompt_batch(rows)
        with torch.inference_mode():
            logits = base.family.outputs(base.model, training.inputs)
        found[who] = training, asked, logits, task.predict(base.model, asked)
    for place in (0, 1):
        with_images, with_features = found["images"][place], found["features"][place]
        plain = {name: value for name, value in with_images.inputs.items() if not name.startswith("pixel_")}
        assert set(with_features.inputs) - {"mm_encoder_outputs"} == set(plain)
        for name, value in plain.items():
            assert torch.equal(value, with_features.inputs[name]), name
        assert ("mm_encoder_outputs" in with_features.inputs) == any(row.images for row in rows)
    assert torch.equal(found["images"][0].labels, found["features"][0].labels)
    mask = found["images"][0].inputs["attention_mask"].bool()
    with_images, with_features = (found[who][2][mask] for who in ("images", "features"))
    assert (with_images - with_features).abs().max() <= ROUNDING * with_images.abs().max()
    assert found["images"][3] == found["features"][3]


def test_a_model_that_takes_no_features_is_refused(base, mixed_rows, monkeypatch):
    monkeypatch.setattr(type(base.model.base_model), "get_image_features", None)
    with pytest.raises(ModelError, match="must accept image features .mm_encoder_outputs., and does not"):
        base.family.image_features(base.model, base.processor, [open_image(mixed_rows[0].images[0])])


def test_a_processor_without_replacements_is_refused(base, mixed_rows, monkeypatch):
    family = type(base.family)
    encode = family._encode
    monkeypatch.setattr(family, "_encode", lambda self, processor, *args: encode(self, base.processor, *args))
    with pytest.raises(ModelError, match="must return the text that replaces an image, and does not"):
        base.family.image_features(base.model, base.processor, [open_image(mixed_rows[0].images[0])])

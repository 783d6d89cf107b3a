"""The collator of a run that replaces images with stored features, and the checks that results stay the same."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object

from finetune.core.matmul import ONEDNN_IS_FASTER
from finetune.data.collate import Collator
from finetune.data.stream import Stream
from finetune.errors import ModelError
from finetune.evaluation.predict import blanked
from finetune.training.feature_store import FeatureStore, StoredFeatures, places_of
from finetune.training.filling import Filler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator

    from finetune.assemble.base import Base
    from finetune.core.example import Example
    from finetune.data.collate import FeatureLookup
    from finetune.data.stream import Rows
    from finetune.interfaces import GenerativeFamily, TaskCollator
    from finetune.recipe import Recipe

_VERSIONS = ("finetune-vlm", "torch", "torchvision", "transformers", "pillow")
# The largest difference of logits, as a share of the largest one. A convolution may round differently for a batch than
# for one image.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def collator_of_run(
    recipe: Recipe,
    base: Base,
    train_rows: Rows,
    asked: Sequence[Example],
    accelerator: Accelerator,
    log: Callable[[str], None],
) -> TaskCollator:
    """Return the collator of a run: one that reads stored features where they change no result.

    Every process has to call it. It logs one line: the features that it stores, or the reason why it stores none.

    Args:
        recipe: the recipe of the run.
        base: the base, which is not adapted yet.
        train_rows: the train rows.
        asked: the rows of the other splits.
        accelerator: the accelerator of the run.
        log: the function that is called with the line.

    Raises:
        FinetuneError: an image cannot be opened.
    """
    found = _why_off(recipe, base, train_rows) or _stored(recipe, base, train_rows, asked, accelerator, log)
    if isinstance(found, str):
        log(f"feature store off: {found}")
        return base.collator_of(recipe.task)
    return cast("Collator", base.collator_of(recipe.task)).reading(found)


def _stored(
    recipe: Recipe,
    base: Base,
    train_rows: Rows,
    asked: Sequence[Example],
    accelerator: Accelerator,
    log: Callable[[str], None],
) -> StoredFeatures | str:
    """Return the features of all rows, checked on a few before and after storing; or the reason why there are none."""
    collator = base.collator_of(recipe.task)
    assert isinstance(collator, Collator) and not isinstance(train_rows, Stream)
    few = [row for row in train_rows if row.images][:2]
    if reason := _agreed(_why_not_exact(base, collator, few, _fresh(base, collator, few))):
        return reason
    with_blanks = [*train_rows, *asked, *blanked(asked)[0]]  # evaluation uses grey images too
    filled = _filler(recipe, base, collator, accelerator, log).fill(with_blanks)
    if isinstance(filled, str):
        return filled
    return _agreed(_why_not_exact(base, collator, few, filled)) or filled


def _agreed(reason: str | None) -> str | None:
    """Return the first reason that any process has."""
    return next((text for text in gather_object([reason]) if text), None)


def _why_off(recipe: Recipe, base: Base, train_rows: Rows) -> str | None:
    """Return the reason why the run stores no features; None if it may."""
    if recipe.train.feature_store == "off":
        return "train.feature_store is off"
    towers = {tower for section in recipe.parts for tower in section.adapted_towers} - {"language"}
    if towers:
        return f"the adapter changes the outputs of the {' and the '.join(sorted(towers))} tower"
    if isinstance(train_rows, Stream):
        return "the train rows are a stream"
    if not isinstance(base.collator_of(recipe.task), Collator):
        return f"task {recipe.task.name} takes no features in place of images"
    return None if any(row.images for row in train_rows) else "no train row has an image"


def _fresh(base: Base, collator: Collator, rows: Sequence[Example]) -> FeatureLookup | str:
    """Return the features of a few rows, computed now; or the reason why there are none."""
    family = cast("GenerativeFamily", base.family)
    try:
        known = {
            places_of(row.images): family.image_features(base.model, base.processor, collator.open(row)) for row in rows
        }
    except ModelError as error:
        return str(error)
    return lambda images: known[places_of(images)]


def _why_not_exact(
    base: Base, collator: Collator, rows: Sequence[Example], features: FeatureLookup | str
) -> str | None:
    """Return how a few rows with features differ in inputs or logits from those with images; None if they agree."""
    if isinstance(features, str):
        return features
    device, dtype = base.model.device, base.model.dtype
    supervised = [(row, True) for row in rows]
    plain = collator.training_batch(supervised).to(device, dtype)
    stored = collator.reading(features).training_batch(supervised).to(device, dtype)
    for name, value in plain.inputs.items():
        other = stored.inputs.get(name)
        if not name.startswith("pixel_") and not (isinstance(other, torch.Tensor) and torch.equal(value, other)):
            return f"the processor of {base.identity.model_type} makes a different {name} without pixels"
    with torch.inference_mode():
        wanted, got = (base.family.outputs(base.model, batch.inputs).float() for batch in (plain, stored))
    difference, largest = float((wanted - got).abs().max()), float(wanted.abs().max())
    if difference > _TOLERANCE.get(dtype, 0.0) * largest:
        return f"the logits of row {rows[0].id} would differ by {difference:.2g} (the largest is {largest:.2g})"
    return None


def _filler(
    recipe: Recipe, base: Base, collator: Collator, accelerator: Accelerator, log: Callable[[str], None]
) -> Filler:
    family = cast("GenerativeFamily", base.family)
    return Filler(
        store=FeatureStore(_key(base)),
        open_images=collator.open,
        compute=lambda images: family.image_features(base.model, base.processor, images),
        max_bytes=recipe.train.feature_store_max_bytes,
        accelerator=accelerator,
        log=log,
    )


def _key(base: Base) -> dict[str, Any]:
    """Return everything that features depend on beside the pixels."""
    config, device = base.model.config, base.model.device
    return {
        "base": base.identity.digest,
        "processor": base.digests.model_dump(mode="json"),
        "dtype": str(base.model.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "float32": torch.get_float32_matmul_precision(),
        "onednn": ONEDNN_IS_FASTER,
        "attention": [str(part._attn_implementation) for part in (config, *_parts(config))],
        "versions": {name: version(name) for name in _VERSIONS},
    }


def _parts(config: Any) -> list[Any]:
    return [getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None]

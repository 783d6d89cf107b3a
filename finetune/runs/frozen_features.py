"""The collator of a run that replaces frozen modules with their stored outputs."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object

from finetune.core.batch import Batch, Features
from finetune.core.matmul import ONEDNN_IS_FASTER
from finetune.data.collate import Collator
from finetune.data.stream import Stream
from finetune.errors import ModelError
from finetune.evaluation.predict import blanked
from finetune.methods.adapter import attach, detach
from finetune.runs.feature_checks import why_not_exact
from finetune.training.feature_store import FeatureStore, StoredFeatures, places_of, row_key
from finetune.training.filling import Content, Filler
from finetune.training.find_boundaries import find_boundaries
from finetune.training.memory import is_out_of_memory
from finetune.training.plan import Plan
from finetune.training.replay import Replay, record

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from PIL.Image import Image

    from finetune.assemble.base import Base
    from finetune.core.example import Example
    from finetune.data.stream import Rows
    from finetune.interfaces import GenerativeFamily, TaskCollator
    from finetune.recipe import Recipe
    from finetune.training.boundary import Boundaries, Boundary

_VERSIONS = ("finetune-vlm", "torch", "torchvision", "transformers", "pillow")


def collator_of_run(
    recipe: Recipe,
    base: Base,
    train_rows: Rows,
    val_rows: Sequence[Example],
    test_rows: Sequence[Example],
    accelerator: Accelerator,
    log: Callable[[str], None],
    *,
    shown: Sequence[Example] = (),
    lockstep: bool = False,
) -> TaskCollator:
    """Return the collator of a run: one that reads stored features where they change no result.

    Every process has to call it. It logs the features that it stores, or the reason why it stores none.

    Args:
        recipe: the recipe of the run.
        base: the base, which is not adapted yet. Its frozen modules return stored outputs from now on, where a batch
            has them.
        train_rows: the train rows.
        val_rows: the rows of validations.
        test_rows: the rows of the test split.
        accelerator: the accelerator of the run.
        log: the function that is called with each line.
        shown: the rows that the run shows and checks beside those that it reads.
        lockstep: whether the processes share one base, so that each has to run as many forwards as the others.

    Raises:
        FinetuneError: an image cannot be opened, or the adapter does not fit the base.
    """
    if reason := _why_off(recipe, base, train_rows):
        log(f"feature store off: {reason}")
        return base.collator_of(recipe.task)
    assert not isinstance(train_rows, Stream)
    filling = _Filling(recipe, base, train_rows, accelerator, log)
    read = [*rows_of_plan(recipe, train_rows, accelerator.num_processes), *shown, *val_rows]
    found = filling.of_images([*read, *test_rows, *blanked(test_rows)[0]])  # an evaluation uses grey images too
    if isinstance(found, str):
        log(f"feature store off: {found}")
        return filling.collator
    if filling.boundaries.rows:
        of_rows = "the processes share one base" if lockstep else filling.of_rows(read, found)
        if isinstance(of_rows, str):
            log(f"feature store: no layer of the language tower is stored: {of_rows}")
        else:
            found = of_rows
    return filling.collator.reading(found)


def rows_of_plan(recipe: Recipe, rows: list[Example], num_processes: int) -> list[Example]:
    """Return the rows that the run reads, which are not all of them if it is shorter than an epoch."""
    counted = [row.num_tokens for row in rows if row.num_tokens is not None]
    grouped = recipe.train.group_by_length and len(counted) == len(rows)
    plan = Plan.of(
        recipe.train,
        num_rows=len(rows),
        num_processes=num_processes,
        seed=recipe.seed,
        lengths=counted if grouped else None,
    )
    if plan.total_steps >= plan.steps_per_epoch:
        return rows
    return [rows[i] for step in range(plan.total_steps) for i in plan.rows(step)]


def _why_off(recipe: Recipe, base: Base, train_rows: Rows) -> str | None:
    """Return the reason why the run stores no features; None if it may."""
    if recipe.train.feature_store == "off":
        return "train.feature_store is off"
    if isinstance(train_rows, Stream):
        return "the train rows are a stream"
    if not isinstance(base.collator_of(recipe.task), Collator):
        return f"task {recipe.task.name} takes no features in place of images"
    return None if any(row.images for row in train_rows) else "no train row has an image"


class _Filling:
    """The filling of a run's feature store: first with what depends on images alone, then with what depends on rows."""

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        train_rows: Sequence[Example],
        accelerator: Accelerator,
        log: Callable[[str], None],
    ):
        self.recipe, self.base, self.accelerator, self.log = recipe, base, accelerator, log
        self.collator = cast("Collator", base.collator_of(recipe.task))
        self.family = cast("GenerativeFamily", base.family)
        self.few = [row for row in train_rows if row.images][:2]

    def of_images(self, rows: Sequence[Example]) -> StoredFeatures | str:
        """Return features of the images of rows, checked on a few; or why there are none."""
        found = self._find()
        if reason := self._agreed(found if isinstance(found, str) else None):
            return reason
        assert not isinstance(found, str)
        self.boundaries = found
        replay = Replay(self.base.model, [found.images, *([found.rows] if found.rows else [])])
        stored = self._filled_with_images(rows)
        if isinstance(stored, str):
            replay.remove()
        return stored

    def of_rows(self, rows: Sequence[Example], images: StoredFeatures) -> StoredFeatures | str:
        """Return features of whole rows with those of ``images``, checked on a few; or why there are none."""
        boundary = self.boundaries.rows
        assert boundary is not None
        content = Content(
            title=f"up to {boundary.end}:",
            key=row_key,
            texts=lambda row: (json.dumps([(found := self.collator.supervise(row)).text, found.supervised]),),
            compute=lambda row, _: self._row_features(boundary, row, images),
            needs_images=False,
            has_features=lambda row: True,
        )
        return self._stored(boundary, content, rows, images.with_supervised)

    def _find(self) -> Boundaries | str:
        """Return the boundaries of the base with the adapter of the recipe, which is attached for one forward."""
        base = self.base
        batch = self.collator.training_batch([(self.few[0], True)]).to(base.model.device, base.model.dtype)
        plain = [name for name, _ in base.model.named_modules()]
        attach(base.host, self.recipe.parts)
        try:
            return find_boundaries(
                base.model, plain, batch.inputs, lambda inputs: base.family.outputs(base.model, inputs)
            )
        except ModelError as error:
            return str(error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return "the device has too little memory for a forward of one row"
        finally:
            detach(base.model)

    def _filled_with_images(self, rows: Sequence[Example]) -> StoredFeatures | str:
        boundary = self.boundaries.images
        content = Content(
            title=f"up to {boundary.end}: the images of",
            key=lambda row: places_of(row.images),
            texts=lambda row: (),
            compute=lambda _, images: self._image_features(boundary, images),
            needs_images=True,
            has_features=lambda row: bool(row.images),
        )
        return self._stored(boundary, content, rows, StoredFeatures)

    def _stored(
        self,
        boundary: Boundary,
        content: Content,
        rows: Sequence[Example],
        features: Callable[[dict[Hashable, Path]], StoredFeatures],
    ) -> StoredFeatures | str:
        """Store features of rows, a few of them first, which must give the logits of their images."""

        def check(paths: dict[Hashable, Path]) -> str | None:
            return self._agreed(why_not_exact(self.base, self.collator, self.few, features(paths)))

        filler = Filler(
            store=FeatureStore(base_key(self.base) | {"boundary": boundary.key}),
            content=content,
            open_images=self.collator.open,
            max_bytes=self.recipe.train.feature_store_max_bytes,
            accelerator=self.accelerator,
            log=self.log,
        )
        paths = filler.fill(rows, first=self.few, check=check)
        return paths if isinstance(paths, str) else features(paths)

    @torch.inference_mode()
    def _image_features(self, boundary: Boundary, images: list[Image]) -> Features:
        model = self.base.model
        step = self.family.image_step(self.base.processor, images)
        batch = Batch(step.inputs, []).to(model.device, model.dtype)
        outputs = record(model, boundary, batch.inputs)
        return Features(outputs=outputs, processed=step.processed, replacements=step.replacements)

    @torch.inference_mode()
    def _row_features(self, boundary: Boundary, row: Example, images: StoredFeatures) -> Features:
        model = self.base.model
        (of_images,) = images([row], supervised=False)
        batch = self.collator.reading(images).training_batch([(row, True)]).to(model.device, model.dtype)
        return Features(
            outputs=record(model, boundary, batch.inputs),
            per_token=boundary.per_token,
            processed=of_images.processed if of_images else {},
            replacements=of_images.replacements if of_images else (),
        )

    def _agreed(self, reason: str | None) -> str | None:
        """Return the first reason that any process has."""
        return next((text for text in gather_object([reason]) if text), None)


def base_key(base: Base) -> dict[str, Any]:
    """Return everything that features of any boundary depend on beside the row."""
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

"""Saving a trained adapter: weights in PEFT's format, and a manifest with their base, data and scores."""

from __future__ import annotations

import platform
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.folder import config_bytes, file_entries, tensor_table, weights_bytes, write_folder
from finetune.adapters.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    AdapterDescription,
    AdapterManifest,
    ImageSpec,
    PartDescription,
    PluginEntry,
    Probe,
    TrainingRecord,
    canonical_json,
    sha256_hex,
)
from finetune.adapters.peft_format import peft_config, peft_type
from finetune.adapters.probe import record
from finetune.adapters.requirements import plugins_of
from finetune.assemble.base import PROBE_SEED
from finetune.core.example import Image
from finetune.core.old_names import RECIPE, earlier_names
from finetune.data.bit_depth import fixed_range
from finetune.data.images import image_digest
from finetune.data.stream import Stream
from finetune.errors import DataError
from finetune.methods.adapter import switch
from finetune.recipe import ReadSection
from finetune.recipe.published import published_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from finetune.assemble.base import Base
    from finetune.core.example import Medium
    from finetune.data.stream import Rows
    from finetune.evaluation.scores import Scores
    from finetune.interfaces import Attachment
    from finetune.recipe import Recipe


def save_weights(folder: Path, attachment: Attachment, tensors: Mapping[str, Tensor], *, model_type: str) -> None:
    """Write weights and config, without a manifest."""
    config = peft_config(describe(attachment, model_type))
    write_folder(folder, {WEIGHTS_NAME: weights_bytes(tensors), CONFIG_NAME: config_bytes(config)})


def describe(attachment: Attachment, model_type: str) -> AdapterDescription:
    """Return the description of an adapter on a base of ``model_type``, for a manifest."""
    parts = [
        PartDescription(method=p.method, options=dict(p.options), modules=dict(p.modules)) for p in attachment.parts
    ]
    return AdapterDescription(
        peft_type=peft_type([part.method for part in parts], model_type=model_type),
        parts=parts,
        tensors=tensor_table(attachment.parameters),
    )


def probe_effect(base: Base, attachment: Attachment) -> Probe:
    """Return the probe of base and adapter; every process that shares the base has to call it."""
    switch(base.model, on=False)
    off = base.probe(PROBE_SEED)
    switch(base.model, on=True)
    on = base.probe(PROBE_SEED, attachment.placeholders)
    return record(off, on, seed=PROBE_SEED, dtype=base.model.dtype, quantization=base.quantization)


def save_adapter(
    folder: Path,
    recipe: Recipe,
    base: Base,
    attachment: Attachment,
    splits: Mapping[str, Rows],
    metrics: Mapping[str, Scores],
    *,
    probe: Probe,
    steps: int,
    parents: Sequence[str] = (),
) -> AdapterManifest:
    """Write the finished adapter with its manifest, replacing ``folder`` in one step.

    Args:
        folder: the folder to write.
        recipe: the recipe that made the adapter.
        base: the base that the adapter is attached to.
        attachment: the adapter, holding the weights to save.
        splits: the rows of the run, by split.
        metrics: ``test`` -> the adapter's scores on the test split, ``base`` -> those of the base alone.
        probe: the probe, from ``probe_effect``.
        steps: the number of optimizer steps behind the weights.
        parents: the references by digest of the adapters whose weights the run started from.
    """
    manifest = _manifest(recipe, base, attachment, splits, metrics, probe=probe, steps=steps, parents=list(parents))
    write_folder(
        folder,
        {
            WEIGHTS_NAME: weights_bytes(attachment.parameters),
            CONFIG_NAME: config_bytes(peft_config(manifest.adapter)),
            MANIFEST_NAME: manifest.to_bytes(),
        },
    )
    return manifest


def data_digest(examples: Rows) -> str:
    """Return the digest of rows: their messages, answers and images, without the paths of these.

    A stream keeps no rows: its digest is that of the names and versions of its files, and of its order.

    Raises:
        DataError: a row has another medium than images.
    """
    if isinstance(examples, Stream):
        return sha256_hex(canonical_json(examples.identity))
    known: dict[str, str] = {}

    def digest(medium: Medium, row: str) -> str:
        if not isinstance(medium, Image):
            raise DataError(
                f"row {row}: the media of a row must be images, of which a manifest keeps digests, got a medium of the "
                f"type {medium.type}. Leave it out."
            )
        source = medium.source
        if not isinstance(source, Path):
            return image_digest(source)
        if str(source) not in known:
            known[str(source)] = image_digest(source)
        return known[str(source)]

    rows: list[list[Any]] = []
    for example in examples:
        rows.append([example.messages, example.answers, [digest(medium, example.id) for medium in example.media]])
        if example.unsupervised:
            rows[-1].append({"unsupervised": sorted(example.unsupervised)})
        if example.columns:
            rows[-1].append({"columns": example.columns})
    return sha256_hex(canonical_json(rows))


def caption_question(rows: Rows) -> str | None:
    """Return the question of most rows whose captions are supervised; None where no row has captions.

    A stream keeps no rows: its first ones count.
    """
    kept = rows.first if isinstance(rows, Stream) else rows
    asked = Counter(str(example.meta["question"]) for example in kept if example.captions)
    return asked.most_common(1)[0][0] if asked else None


def _image_spec(recipe: Recipe) -> ImageSpec:
    """Return the recipe's settings for opening images, with the range if it read images of more than 8 bits."""
    if not isinstance(recipe.data, ReadSection):
        return ImageSpec()
    found = fixed_range(recipe.data)
    return ImageSpec(range=list(found) if found else None, page=recipe.data.image_page)


def _plugins(recipe: Recipe, base: Base) -> list[PluginEntry]:
    """Return the other packages that the adapter needs."""
    named = [("tasks", recipe.task.name), *(("methods", part.name) for part in recipe.parts)]
    return plugins_of([*named, ("families", base.identity.model_type)])


def _manifest(
    recipe: Recipe,
    base: Base,
    attachment: Attachment,
    splits: Mapping[str, Rows],
    metrics: Mapping[str, Scores],
    *,
    probe: Probe,
    steps: int,
    parents: list[str],
) -> AdapterManifest:
    description = describe(attachment, base.identity.model_type)
    namespace, _, name = (recipe.adapter.publish or f"{recipe.domain}/{recipe.name}").partition("/")
    return AdapterManifest(
        namespace=namespace,
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        synthetic=recipe.data.synthetic,
        base=base.identity,
        processor=base.digests,
        adapter=description,
        images=_image_spec(recipe),
        task=recipe.task.as_trained(caption_question=caption_question(splits.get("train", []))),
        plugins=_plugins(recipe, base),
        toolchain={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        },
        training=TrainingRecord(
            recipe_digest=sha256_hex(canonical_json(earlier_names(recipe.identity(), RECIPE))),
            recipe=published_recipe(recipe),
            data={split: data_digest(rows) for split, rows in splits.items() if rows},
            rows={split: rows.seen if isinstance(rows, Stream) else len(rows) for split, rows in splits.items()},
            streamed=[split for split, rows in splits.items() if isinstance(rows, Stream)],
            seed=recipe.seed,
            steps=steps,
            task=recipe.task.name,
            domain=recipe.domain,
        ),
        metrics={who: scores.to_json() for who, scores in metrics.items()},
        probe=probe,
        license=recipe.adapter.license,
        intended_use=recipe.adapter.intended_use,
        parents=parents,
        files=file_entries(weights_bytes(attachment.parameters), config_bytes(peft_config(description))),
    )

"""From a recipe to live objects: the only place where rooms are put together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from finetune.adapters.base_identity import identify_base, identify_processor
from finetune.adapters.probe import probe_conversation, probe_logits
from finetune.data.collate import Collator
from finetune.data.lengths import Lengths, fitting
from finetune.data.open_stream import open_stream
from finetune.data.reading import read_split, tally
from finetune.errors import DataError, ModelError
from finetune.families.base import embedded_path, family_of
from finetune.interfaces import Batch, Host
from finetune.lookup import import_string, look_up
from finetune.recipe import ReadSection, StreamableData
from finetune.tables import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.adapters.manifest import BaseIdentity, ProcessorDigests
    from finetune.data.stream import Rows
    from finetune.example import Example
    from finetune.interfaces import ModelFamily, Placeholders, Task, Towers
    from finetune.recipe import Quantization, Recipe, TaskSection

PROBE_SEED = 0


@dataclass(frozen=True)
class Base:
    """A frozen base model, ready to be adapted or asked."""

    model: PreTrainedModel
    processor: ProcessorMixin
    family: ModelFamily
    collator: Collator
    path: str  # what it was loaded from
    quantization: Quantization | None
    identity: BaseIdentity
    digests: ProcessorDigests

    @cached_property
    def towers(self) -> Towers:
        """Where the model's towers are."""
        return self.family.towers(self.model)

    @property
    def host(self) -> Host:
        """The base as a method sees it."""
        inputs = self.probe_batch(PROBE_SEED).inputs
        return Host(self.model, self.towers, self.processor.tokenizer, inputs)

    @property
    def lengths(self) -> Lengths:
        """Counts the tokens of rows for this base."""
        return Lengths(self.collator, key=self.digests.model_dump_json())

    def task(self, options: TaskSection) -> Task:
        """Returns the task that ``options`` describe, for this base's tokenizer."""
        return import_string(look_up(TASKS, options.name, what="task"))(options, self.processor.tokenizer)

    def probe_batch(self, seed: int) -> Batch:
        """Returns the probe's one row, on the model's device."""
        messages, picture = probe_conversation(seed)
        text = self.collator.render(messages)
        inputs = self.family.encode(self.processor, [text], [[picture]], padding_side="right")
        return Batch(inputs, []).to(self.model.device, self.model.dtype)

    def probe(self, seed: int, placeholders: Placeholders | None = None) -> Tensor:
        """Returns the probe's logits [4, 64] of the model as it now is; ``placeholders`` are the active adapter's."""
        batch = self.probe_batch(seed)
        return probe_logits(self.model, (placeholders.insert(batch) if placeholders else batch).inputs, seed=seed)


@dataclass(frozen=True)
class Batches:
    """Makes the batches of one adapter: the collator's, with the places that its prompt fills, where it has one.

    It holds nothing that lives on a device, so that worker processes can have it.
    """

    collator: Collator
    placeholders: Placeholders | None

    def training_batch(self, rows: list[tuple[Example, bool]]) -> Batch:
        """Returns right-padded rows with labels."""
        return self._extend(self.collator.training_batch(rows))

    def prompt_batch(self, rows: Sequence[Example]) -> Batch:
        """Returns left-padded rows that end where the answer begins."""
        return self._extend(self.collator.prompt_batch(rows))

    def _extend(self, batch: Batch) -> Batch:
        return self.placeholders.insert(batch) if self.placeholders else batch


def pick_device(wanted: str = "auto") -> str:
    """Returns ``wanted``, or for ``auto`` the best device of this machine."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    quantization: Quantization | None = None,
    verify: str = "cached",
    data: ReadSection | None = None,
) -> Base:
    """Loads a base: an embedded one by name, a folder, or a hub id.

    Args:
        name_or_path: which.
        revision: of a hub id.
        dtype: what it is held in.
        device: ``auto`` picks the best of this machine.
        quantization: of the language tower, ``4bit`` or ``8bit``.
        verify: ``cached`` trusts digests of files that have not changed; ``full`` hashes every byte.
        data: says which turns of a conversation are learnt, and how large a picture may be.

    Raises:
        ModelError: it cannot be loaded, or no family supports it.
    """
    path = embedded_path(name_or_path)
    family = family_of(path, revision=revision)
    identity = identify_base(path, revision=revision, verify=verify)  # before a byte of it is loaded
    model, processor = family.load(
        path, revision=revision, dtype=dtype, device=pick_device(device), quantization=quantization
    )
    ends = model.generation_config.eos_token_id
    end_ids = ends if isinstance(ends, list) else [ends]
    if not end_ids or end_ids == [None]:
        raise ModelError(f"{name_or_path}: its generation config names no eos_token_id, so no answer would end")
    options = data.model_dump(include={"supervise", "max_image_pixels"}) if data else {}
    return Base(
        model=model,
        processor=processor,
        family=family,
        collator=Collator(family, processor, end_ids, **options),
        path=path,
        quantization=quantization,
        identity=identity,
        digests=identify_processor(path, revision=revision, chat_template=str(processor.chat_template)),
    )


def base_of(recipe: Recipe, *, device: str | None = None) -> Base:
    """Loads the base a recipe names."""
    section = recipe.model
    return load_base(
        section.name_or_path,
        revision=section.revision,
        dtype=section.dtype,
        device=device or section.device,
        quantization=section.quantization,
        data=recipe.data if isinstance(recipe.data, ReadSection) else None,
    )


def examples_of(
    recipe: Recipe, split: str, *, base: Base | None = None, say: Callable[[str], None] = print
) -> list[Example]:
    """Reads one split of a recipe's data; an empty list where the recipe has none.

    Args:
        recipe: the whole recipe.
        split: ``train``, ``val`` or ``test``.
        base: checks, where given, that every row can be put to it and fits.
        say: is told of rows that were left out.

    Raises:
        DataError: a row that cannot be used.
    """
    bad = tally(recipe.data, split, say=say)
    examples = read_split(recipe.data, split, task=recipe.task, seed=recipe.seed, bad=bad)
    if base is not None and examples:
        room = 0 if split == "train" else recipe.task.max_new_tokens
        limit = _max_length(recipe, base)
        examples = fitting(examples, base.lengths, recipe.data, split, limit=limit, room=room, bad=bad)
    bad.conclude()
    return examples


def rows_to_learn(recipe: Recipe, *, base: Base | None = None, say: Callable[[str], None] = print) -> Rows:
    """Reads the train rows of a recipe's data, or opens them where they stream; arguments as ``examples_of``."""
    if not isinstance(recipe.data, StreamableData) or not recipe.data.streaming:
        return examples_of(recipe, "train", base=base, say=say)
    return open_stream(
        recipe.data,
        task=recipe.task,
        seed=recipe.seed,
        bad=tally(recipe.data, "train", say=say),
        lengths=base.lengths if base else None,
        limit=_max_length(recipe, base) if base else None,
    )


def _max_length(recipe: Recipe, base: Base) -> int | None:
    """Returns how many tokens a row may have; None for no bound."""
    most = max_positions(base.model)
    limit = recipe.data.max_length or most
    if limit and most and limit > most:
        raise DataError(f"data.max_length is {limit}, but the base takes {most} tokens")
    return limit


def max_positions(model: PreTrainedModel) -> int | None:
    """Returns how many tokens the language model takes; None where its config sets no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)

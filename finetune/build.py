"""Building live objects from a recipe; no other module puts the parts of the package together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch

from finetune.adapters.base_check import check_base
from finetune.adapters.base_identity import identify_base, identify_processor
from finetune.adapters.probe import probe_conversation, probe_values
from finetune.core.batch import Batch, Rendered
from finetune.core.matmul import speed_up
from finetune.data.lengths import fitting, max_positions
from finetune.data.open_stream import open_stream
from finetune.data.splits import read_split, tally
from finetune.data.stream import Stream
from finetune.errors import DataError, ModelError, PluginError, RecipeError
from finetune.families.base import embedded_path, family_of
from finetune.families.placement import pick_device, pick_dtype
from finetune.interfaces import Host
from finetune.methods.adapter import check_methods
from finetune.methods.modules import language_head
from finetune.objectives.weighted import Weighted
from finetune.plugins import find
from finetune.recipe import (
    HubData,
    MixData,
    ParquetData,
    PromptTuningSection,
    ReadSection,
    StreamableData,
    objective_of,
    refuse_incompatible,
    task_of,
    tasks_for,
    why_incompatible,
)
from finetune.training.step import Reference, TaskObjective

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.adapters.manifest import BaseIdentity, ProcessorDigests
    from finetune.core.batch import Placeholders
    from finetune.core.example import Example, Message
    from finetune.data.stream import Rows
    from finetune.interfaces import ModelFamily, Objective, RowLengths, Task, TaskCollator, Towers
    from finetune.recipe import AttnImplementation, ObjectiveSection, Quantization, Recipe, TaskSection

PROBE_SEED = 0


@dataclass(frozen=True)
class Base:
    """A frozen base model, ready to be adapted or asked."""

    model: PreTrainedModel
    processor: ProcessorMixin
    family: ModelFamily
    path: str  # what it was loaded from
    quantization: Quantization | None
    identity: BaseIdentity
    digests: ProcessorDigests
    data: ReadSection | None  # what the recipe says of rows and images, where there is one
    # Held while threads that share the base make inputs: a tokenizer keeps on itself, from one of its steps to the
    # next, how it pads.
    preparing: RLock = field(default_factory=RLock, repr=False)
    _collators: dict[Any, TaskCollator] = field(default_factory=dict, repr=False)  # of each kind of task

    @cached_property
    def towers(self) -> Towers:
        """The modules of each of the model's towers."""
        return self.family.towers(self.model)

    @property
    def host(self) -> Host:
        """The base as a method sees it."""
        inputs = self.probe_batch(PROBE_SEED).inputs
        outputs = partial(self.family.outputs, self.model, inputs)
        return Host(self.model, self.towers, self.processor.tokenizer, outputs)

    @property
    def collator(self) -> TaskCollator:
        """The collator of the first task that serves the base."""
        return self._collator(tasks_for(self.family.architecture)[0])

    def collator_of(self, options: TaskSection) -> TaskCollator:
        """Return the collator of a task; tasks that make batches alike have the same one."""
        return self._collator(options.name)

    def _collator(self, task: str) -> TaskCollator:
        make = getattr(_task_class(task), "collator", None)
        if not callable(make):
            raise PluginError(f"task {task} must have a function collator(family, model, processor, data)")
        if make not in self._collators:
            with self.preparing:  # building it asks the tokenizer, which other threads may use
                if make not in self._collators:
                    self._collators[make] = make(self.family, self.model, self.processor, self.data)
        return self._collators[make]

    def lengths(self, options: TaskSection) -> RowLengths:
        """Return the counter of the tokens of a task's rows."""
        return self.collator_of(options).lengths(key=self.digests.model_dump_json())

    @property
    def default_task(self) -> TaskSection:
        """The settings of the task for the base alone, where no adapter brings its own."""
        return task_of(self.family.architecture)

    def task(self, options: TaskSection) -> Task:
        """Return the task that ``options`` describe, for this base's tokenizer.

        Raises:
            ModelError: the base cannot do it.
        """
        family = self.family
        if reason := why_incompatible(options.name, family.model_type, architecture=family.architecture):
            raise ModelError(f"{self.path}: {reason}")
        made: Task = _task_class(options.name)(options, self.processor.tokenizer)
        return made

    def objective(
        self,
        task: Task,
        sections: Sequence[ObjectiveSection] | None = None,
        *,
        placeholders: Placeholders | None = None,
    ) -> TaskObjective:
        """Return the objective of a run over a task.

        Args:
            task: the task, from ``task``.
            sections: the recipe's ``objectives``; by default the task's own.
            placeholders: the places that the trained adapter's prompt fills.
        """
        sections = sections or [objective_of(task.options.objective)]
        parts: dict[str, tuple[float, Objective]] = {}
        for section in sections:
            made = find("objectives", section.name, what="objective")(section)
            if section.couples_rows != hasattr(made, "backward_window"):
                raise PluginError(
                    f"objective {section.name} must have backward_window if and only if its Config says couples_rows; "
                    f"couples_rows is {section.couples_rows}"
                )
            parts[section.name] = (section.weight, made)
        objective = Weighted(parts) if len(parts) > 1 else next(iter(parts.values()))[1]
        return TaskObjective(
            task,
            objective,
            Reference(self.model, task.outputs, placeholders),
            couples_rows=any(section.couples_rows for section in sections),
        )

    def probe_batch(self, seed: int) -> Batch:
        """Return the probe's one row, on the model's device."""
        return self.one_row(*probe_conversation(seed))

    def one_row(self, messages: list[Message], image: Image) -> Batch:
        """Return a batch of one conversation about one image, on the model's device."""
        text = self.collator.render(messages)
        with self.preparing:
            inputs = self.family.encode(self.processor, [Rendered(text, (image,))], padding_side="right")
        return Batch(inputs, []).to(self.model.device, self.model.dtype)

    def probe(self, seed: int, placeholders: Placeholders | None = None) -> Tensor:
        """Return the probe's values of the model as it now is; ``placeholders`` are the active adapter's."""
        batch = self.probe_batch(seed)
        inputs = (placeholders.insert(batch) if placeholders else batch).inputs
        with torch.inference_mode():
            outputs = self.family.outputs(self.model, inputs)[0]
        # A head of a task gives fewer outputs; the language head in whose place it stands knows how many the base has.
        width = max(outputs.shape[-1], getattr(language_head(self.model), "out_features", 0))
        return probe_values(outputs, seed=seed, width=width)


@dataclass(frozen=True)
class Batches:
    """The batches of one adapter: the collator's, with the placeholders of its prompt, where it has one.

    It holds nothing that lives on a device, so that worker processes can have it.
    """

    collator: TaskCollator
    placeholders: Placeholders | None

    def training_batch(self, rows: list[tuple[Example, bool]]) -> Batch:
        """Return rows with labels."""
        return self._extend(self.collator.training_batch(rows))

    def prompt_batch(self, rows: Sequence[Example]) -> Batch:
        """Return rows that are to be answered."""
        return self._extend(self.collator.prompt_batch(rows))

    def _extend(self, batch: Batch) -> Batch:
        return self.placeholders.insert(batch) if self.placeholders else batch


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    quantization: Quantization | None = None,
    attn_implementation: AttnImplementation = "auto",
    verify: str = "cached",
    data: ReadSection | None = None,
) -> Base:
    """Load a base: an embedded one by name, a folder, or a hub id.

    Args:
        name_or_path: the base to load.
        revision: the revision of a hub id.
        dtype: the dtype of the base's weights, as for ``pick_dtype``.
        device: the device of the base, as for ``pick_device``.
        quantization: the quantization of the language tower, ``4bit`` or ``8bit``.
        attn_implementation: the implementation of attention; ``auto`` leaves the choice to transformers.
        verify: ``cached`` trusts digests of files that have not changed; ``full`` hashes every byte.
        data: the section with the supervised turns and the largest image.

    Raises:
        ModelError: it cannot be loaded, or no family supports it.
    """
    check_base(name_or_path, revision=revision)
    path = embedded_path(name_or_path)
    family = family_of(path, revision=revision)
    first, *_ = tasks_for(family.architecture)
    identity = identify_base(path, revision=revision, verify=verify)  # before a byte of it is loaded
    model, processor = family.load(
        path,
        revision=revision,
        dtype=pick_dtype(dtype, path, revision=revision),
        device=pick_device(device),
        quantization=quantization,
        attn_implementation=attn_implementation,
    )
    speed_up(model.modules())
    base = Base(
        model=model,
        processor=processor,
        family=family,
        path=path,
        quantization=quantization,
        identity=identity,
        digests=identify_processor(path, revision=revision, chat_template=str(processor.chat_template or "")),
        data=data,
    )
    base._collator(first)  # a base that lacks what its collator takes is refused now
    return base


def _task_class(name: str) -> Any:
    return find("tasks", name, what="task", error=ModelError)


def _refuse_references(recipe: Recipe) -> None:
    """Refuse an objective that needs the base alone, where the task predicts by parts that only an adapter has."""
    for section in recipe.objectives if recipe.task.parts else ():
        if find("objectives", section.name, what="objective").needs_reference:
            raise RecipeError(
                f"{recipe.name}: objective {section.name} needs the outputs of the base alone, and task "
                f"{recipe.task.name} gives outputs by parts that only the adapter has. Name another objective."
            )


def check_method(recipe: Recipe) -> None:
    """Check that the base has the modules which a recipe's method adapts, before its weights or a row are read.

    Raises:
        RecipeError: what the recipe wants of the base is impossible.
        ModelError: there is no such base, or its towers cannot be found.
        MethodError: it lacks a module.
    """
    section = recipe.model
    check_base(section.name_or_path, revision=section.revision)
    path = embedded_path(section.name_or_path)
    family = family_of(path, revision=section.revision)
    tasks_for(family.architecture)
    _refuse_references(recipe)
    refuse_incompatible(recipe, source=recipe.name, model_type=family.model_type, architecture=family.architecture)
    try:
        skeleton = family.skeleton(path, revision=section.revision)
    except Exception:  # a class that needs weights to be built; ``attach`` checks the same on the loaded model
        return
    check_methods(skeleton, family.towers(skeleton), recipe.parts)


def base_of(recipe: Recipe, *, device: str | None = None) -> Base:
    """Load the base that a recipe names.

    Raises:
        RecipeError: what the recipe wants of it is impossible.
        ModelError: it cannot be loaded.
    """
    section = recipe.model
    check_base(section.name_or_path, revision=section.revision)
    family = family_of(embedded_path(section.name_or_path), revision=section.revision)
    refuse_incompatible(recipe, source=recipe.name, model_type=family.model_type, architecture=family.architecture)
    return load_base(
        section.name_or_path,
        revision=section.revision,
        dtype=section.dtype,
        device=device or section.device,
        quantization=section.quantization,
        attn_implementation=section.attn_implementation,
        data=recipe.data if isinstance(recipe.data, ReadSection) else None,
    )


def examples_of(
    recipe: Recipe, split: str, *, base: Base | None = None, log: Callable[[str], None] = print
) -> list[Example]:
    """Read one split of a recipe's data; the list is empty where the recipe has no such split.

    Args:
        recipe: the whole recipe.
        split: ``train``, ``val`` or ``test``.
        base: the base that every row must fit, if given.
        log: the function that is called with each line about rows that were left out.

    Raises:
        DataError: a row that cannot be used.
    """
    bad = tally(recipe.data, split, log=log)
    examples = read_split(recipe.data, split, task=recipe.task, seed=recipe.seed, bad=bad)
    prepare = recipe.task.to_evaluate if split != "train" else list
    examples = prepare(examples)
    if base is not None and examples:
        limit = _max_length(recipe, base)
        room = _prompt_length(recipe) + (recipe.task.answer_room if split != "train" else 0)
        examples = fitting(examples, base.lengths(recipe.task), recipe.data, split, limit=limit, room=room, bad=bad)
    bad.conclude()
    return prepare(examples)  # again: nothing may come from a row that was left out


def check_rows(recipe: Recipe) -> None:
    """Read every row and image once, before the weights of a base are loaded.

    What is found of an image is noted on disk, so that the rows are read again at little cost. A stream, and rows that
    a program draws, are left out.

    Raises:
        DataError: a row or an image that cannot be used.
    """
    data = recipe.data
    for section in map(data.part, data.sources) if isinstance(data, MixData) else [data]:
        for split in ("train", "val", "test"):
            streams = split == "train" and isinstance(section, StreamableData) and section.streaming
            if isinstance(section, ReadSection) and not streams:
                bad = tally(section, split, log=lambda _: None)
                # The train rows decide how images are scaled; those of a mix decide it together.
                bad.is_part = split != "train" or isinstance(data, MixData)
                read_split(section, split, task=recipe.task, seed=recipe.seed, bad=bad)
                bad.conclude()


def training_rows(recipe: Recipe, *, base: Base | None = None, log: Callable[[str], None] = print) -> Rows:
    """Read the train rows of a recipe's data, or open them where they stream; arguments as ``examples_of``."""
    if not isinstance(recipe.data, HubData | ParquetData) or not recipe.data.streaming:
        return examples_of(recipe, "train", base=base, log=log)
    limit = _max_length(recipe, base) if base else None
    return open_stream(
        recipe.data,
        task=recipe.task,
        seed=recipe.seed,
        bad=tally(recipe.data, "train", log=log),
        lengths=base.lengths(recipe.task) if base else None,
        limit=limit and limit - _prompt_length(recipe),
    )


def with_image_range(recipe: Recipe, rows: Rows) -> Recipe:
    """Return the recipe with the range of its images, where its train rows have decided it."""
    if not isinstance(recipe.data, ReadSection) or recipe.data.image_range != "auto":
        return recipe
    first = rows.first if isinstance(rows, Stream) else rows
    found = next((row.image_options.range for row in first), None)
    if found is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"image_range": list(found)})})


def _prompt_length(recipe: Recipe) -> int:
    """Return the number of tokens that the adapter's own prompt adds to a row."""
    return sum(part.num_virtual_tokens for part in recipe.parts if isinstance(part, PromptTuningSection))


def _max_length(recipe: Recipe, base: Base) -> int | None:
    """Return the largest number of tokens of a row; None for no bound."""
    most = max_positions(base.model)
    limit = recipe.data.max_length or most
    if limit and most and limit > most:
        raise DataError(f"data.max_length is {limit}, but the base takes {most} tokens")
    return limit

"""A loaded base: model, processor and family, with the objects that tasks and methods need."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch

from finetune.adapters.probe import probe_conversation, probe_values
from finetune.core.batch import Batch, Rendered
from finetune.errors import ModelError, PluginError
from finetune.interfaces import Host, PreparedTask
from finetune.methods.modules import language_head
from finetune.objectives.weighted import Weighted
from finetune.plugins import find
from finetune.recipe import (
    ReadSection,
    objective_of,
    task_of,
    tasks_for,
    why_incompatible,
)
from finetune.training.step import Reference, TaskObjective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.adapters.manifest import BaseIdentity, ProcessorDigests
    from finetune.core.batch import Placeholders
    from finetune.core.example import Message
    from finetune.interfaces import ModelFamily, Objective, RowLengths, Task, TaskCollator, Towers
    from finetune.recipe import ObjectiveSection, Quantization, TaskSection

PROBE_SEED = 0


@dataclass(frozen=True)
class Base:
    """A frozen base model, ready for an adapter or for questions."""

    model: PreTrainedModel
    processor: ProcessorMixin
    family: ModelFamily
    path: str  # folder or hub id of the base
    quantization: Quantization | None
    identity: BaseIdentity
    digests: ProcessorDigests
    data: ReadSection | None  # the recipe's settings for rows and images; None without a recipe
    # Threads that share the base hold this lock while they make inputs: a tokenizer keeps its padding as its own state
    # from one of its steps to the next.
    preparing: RLock = field(default_factory=RLock, repr=False)
    _collators: dict[Any, TaskCollator] = field(default_factory=dict, repr=False)  # function of a task -> its collator

    @cached_property
    def towers(self) -> Towers:
        """Each tower -> the paths of its modules."""
        return self.family.towers(self.model)

    @cached_property
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
        """Return the collator of a task; tasks with the same function for it share one."""
        return self._collator(options.name)

    def _collator(self, task: str) -> TaskCollator:
        make = getattr(_task_class(task), "collator", None)
        if not callable(make):
            raise PluginError(
                f"task {task} must have a function collator(family, model, processor, data), got "
                f"{'none' if make is None else type(make).__name__}"
            )
        if make not in self._collators:
            with self.preparing:  # making it uses the tokenizer, as other threads may
                if make not in self._collators:
                    self._collators[make] = make(self.family, self.model, self.processor, self.data)
        return self._collators[make]

    def lengths(self, options: TaskSection) -> RowLengths:
        """Return the counter of the tokens of a task's rows."""
        return self.collator_of(options).lengths(key=self.digests.model_dump_json())

    @property
    def default_task(self) -> TaskSection:
        """The settings of the task for the base alone, without those of an adapter."""
        return task_of(self.family.architecture)

    def task(self, options: TaskSection) -> Task:
        """Return the task that ``options`` describe, for this base's tokenizer.

        Raises:
            ModelError: the base does not support the task.
            DataError: the settings of the task do not fit the base.
        """
        family = self.family
        if reason := why_incompatible(options.name, family.model_type, architecture=family.architecture):
            raise ModelError(f"{self.path}: {reason}")
        made: Task = _task_class(options.name)(options, self.processor.tokenizer)
        if isinstance(made, PreparedTask):
            with self.preparing:
                made.prepare(self.collator_of(options))
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
            placeholders: the placeholders of the trained adapter's prompt.
        """
        sections = sections or [objective_of(task.options.objective)]
        parts: dict[str, tuple[float, Objective]] = {}
        for section in sections:
            made = find("objectives", section.name, what="objective")(section)
            if section.couples_rows != hasattr(made, "accumulate_gradients"):
                raise PluginError(
                    f"objective {section.name} must have a method accumulate_gradients if and only if its Config sets "
                    f"couples_rows; couples_rows is {section.couples_rows}, and the method is "
                    f"{'missing' if section.couples_rows else 'there'}"
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
        """Return the batch with the one row of the probe, on the model's device."""
        return self.one_row(*probe_conversation(seed))

    def one_row(self, messages: list[Message], image: Image) -> Batch:
        """Return a batch of one conversation about one image, on the model's device."""
        text = self.collator.render(messages)
        with self.preparing:
            inputs = self.family.encode(self.processor, [Rendered(text, (image,))], padding_side="right")
        return Batch(inputs, []).to(self.model.device, self.model.dtype)

    def probe(self, seed: int, placeholders: Placeholders | None = None) -> Tensor:
        """Return the probe's values of the model in its present state; ``placeholders`` are the active adapter's."""
        batch = self.probe_batch(seed)
        inputs = (placeholders.insert(batch) if placeholders else batch).inputs
        with torch.inference_mode():
            outputs = self.family.outputs(self.model, inputs)[0]
        # The head of a task gives fewer outputs than the base; the language head that it replaces knows their number.
        width = max(outputs.shape[-1], getattr(language_head(self.model), "out_features", 0))
        return probe_values(outputs, seed=seed, width=width)


def _task_class(name: str) -> Any:
    return find("tasks", name, what="task", error=ModelError)

"""The rows of a run: reading, the survey, and the settings of the task that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.assemble.batches import Batches
from finetune.assemble.rows import examples_of, training_rows, with_image_range
from finetune.data.lengths import max_positions
from finetune.data.stream import Stream
from finetune.data.survey import Survey
from finetune.errors import brief
from finetune.evaluation.prompt_checks import check_answers, check_prompts, complete_task, report_lengths
from finetune.runs.saving import caption_question

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune.assemble.base import Base
    from finetune.core.batch import Placeholders
    from finetune.core.example import Example
    from finetune.data.stream import Rows
    from finetune.data.survey import PromptShape
    from finetune.interfaces import TaskCollator
    from finetune.recipe import Recipe, TaskSection


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """The rows of all splits of a run.

    Attributes:
        recipe: the recipe, with the settings of task and image range that the data determines.
        train: the training rows.
        val: the rows that choose the best weights; empty where the recipe has no such split.
        test: the rows on which base and adapter are evaluated; empty where the recipe has no such split.
        shapes: each shape of a prompt -> the first row that has it.
    """

    recipe: Recipe
    train: Rows
    val: list[Example]
    test: list[Example]
    shapes: dict[PromptShape, Example]

    @property
    def splits(self) -> dict[str, Rows]:
        """The rows by split."""
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def first(self) -> list[Example]:
        """A few training rows for display."""
        return self.train.first if isinstance(self.train, Stream) else self.train[:3]

    @property
    def counts(self) -> str:
        """The number of rows in each split, for people."""
        train = "a stream" if isinstance(self.train, Stream) else len(self.train)
        return f"train {train}, val {len(self.val)}, test {len(self.test)}"

    def check_prompts(
        self,
        base: Base,
        collator: TaskCollator,
        *,
        task: TaskSection | None = None,
        placeholders: Placeholders | None = None,
        when: str,
    ) -> None:
        """Check that an app's prompts are the training prompts, as ``prompt_checks.check_prompts`` does.

        Args:
            base: the base that an app uses.
            collator: the collator that makes the training batches.
            task: the task section of the saved manifest; by default the section that the recipe will save.
            placeholders: the placeholders of a tuned prompt.
            when: the stage of the run, for errors.
        """
        task = task or self.recipe.task.as_trained(caption_question=caption_question(self.train))
        trained, asked = Batches(collator, placeholders), Batches(base.collator_of(task), placeholders)
        check_prompts(task, self.shapes, trained=trained, asked=asked, when=when)


def read_run_rows(recipe: Recipe, base: Base, log: Callable[[str], None]) -> RunRows:
    """Read all splits of a recipe's data, and log the facts that a user should check.

    Raises:
        DataError: a row cannot be used, or the rows have no common prompt.
    """
    train = training_rows(recipe, base=base, log=log)
    recipe = with_image_range(recipe, train)
    surveys = {"train": train.survey if isinstance(train, Stream) else Survey.of(train)}
    task = complete_task(recipe.task, surveys["train"], limit=max_positions(base.model))
    if filled_in := [f"{key}={brief(value)}" for key, value in task if value != getattr(recipe.task, key)]:
        log(f"task, from the rows: {', '.join(filled_in)}")
    recipe = recipe.model_copy(update={"task": task})
    if isinstance(train, Stream):
        train.keep_prompt(task)
    val, test = (examples_of(recipe, split, base=base, log=log) for split in ("val", "test"))
    surveys |= {"val": Survey.of(val), "test": Survey.of(test)}
    report_lengths(task, surveys, log)
    base.task(task)  # a task may refuse its settings for this base
    check_answers(task, surveys, log)
    shapes = {shape: row for survey in surveys.values() for shape, row in survey.shapes.items()}
    return RunRows(recipe=recipe, train=train, val=val, test=test, shapes=shapes)

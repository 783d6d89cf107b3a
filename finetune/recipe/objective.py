"""Sections of the recipe for objectives, which a run minimises."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny

from finetune.plugins import config_of, names
from finetune.recipe.chosen import Choice, as_list
from finetune.recipe.section import Section


class ObjectiveSection(Section):
    """An objective; the base of every objective's own section."""

    takes: ClassVar[str]  # the outputs of a task from which the loss is computed
    couples_rows: ClassVar[bool] = False  # True if the loss of a row depends on the other rows of an optimizer step

    name: str
    """The name of the objective."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(default=1.0, examples=[0.5])
    """Weight of the objective's mean in the sum that is minimised, if there are several objectives."""


class CrossEntropySection(ObjectiveSection):
    """The next-token loss of the supervised tokens."""

    takes: ClassVar[str] = "token_logits"

    name: Literal["cross_entropy"]
    """The name of the objective."""


class ContrastiveObjectiveSection(ObjectiveSection):
    """The symmetric loss of images and texts over all rows of an optimizer step (https://arxiv.org/abs/2103.00020)."""

    takes: ClassVar[str] = "pair_embeddings"
    couples_rows: ClassVar[bool] = True

    name: Literal["contrastive"]
    """The name of the objective."""


_Part = Annotated[SerializeAsAny[ObjectiveSection], Choice("objectives")]


def objective_of(name: str) -> ObjectiveSection:
    """Return the section of an objective from its name alone, with defaults for the rest."""
    config: type[ObjectiveSection] = config_of("objectives", name, what="objective")
    return config(name=name)


def taking(outputs: str) -> list[str]:
    """Return the names of the objectives that are computed from such outputs."""
    return [
        name for name in sorted(names("objectives")) if config_of("objectives", name, what="objective").takes == outputs
    ]


def _can_be_combined(sections: list[ObjectiveSection]) -> list[ObjectiveSection]:
    named = [section.name for section in sections]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise ValueError(f"an objective must be unique, but {twice!r} is given twice. Remove one of them")
    coupled = next((section.name for section in sections if section.couples_rows), None)
    if coupled and len(sections) > 1:
        raise ValueError(
            f"{coupled} must be the only objective, got {', '.join(named)}: its loss depends on all rows of an "
            "optimizer step, so it cannot be added to the loss of a micro-batch. Remove it or the others"
        )
    if len(sections) == 1 and sections[0].weight != 1:
        raise ValueError(
            f"the weight of a single objective must be 1, got {sections[0].weight:g} for {named[0]}. Remove weight, "
            "and set train.learning_rate for larger or smaller steps"
        )
    return sections


# One objective, or a list of several whose weighted sum is minimised.
Objectives = Annotated[
    list[_Part],
    Field(min_length=1),
    BeforeValidator(as_list, json_schema_input_type=_Part | list[_Part]),
    AfterValidator(_can_be_combined),
]

"""How the frozen base is adapted."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finetune.recipe.section import PositiveInt, Section


class TowerTarget(Section):
    """What is adapted in one tower."""

    target_modules: Literal["all-linear", "none"] | list[str]
    """``all-linear``, ``none``, or names of modules."""
    r: PositiveInt | None = None
    """Rank; the method's own by default."""
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """The method's own by default."""


def _tower_target(value: Any) -> Any:
    return {"target_modules": value} if isinstance(value, str | list) else value


Target = Annotated[
    TowerTarget,
    BeforeValidator(_tower_target, json_schema_input_type=Literal["all-linear", "none"] | list[str] | TowerTarget),
]


class TowerTargets(Section):
    """Per tower ``all-linear``, ``none``, a list of module names, or a mapping with an ``r`` of its own."""

    language: Target = TowerTarget(target_modules="all-linear")
    """The language model."""
    projector: Target = TowerTarget(target_modules="none")
    """What turns the features of a picture into tokens."""
    vision: Target = TowerTarget(target_modules="none")
    """The vision tower."""


class LoraSection(Section):
    """Low-rank adaptation (Hu et al., https://arxiv.org/abs/2106.09685); option names are PEFT's."""

    name: Literal["lora"]
    """The method."""
    r: PositiveInt = 16
    """Rank of the two small matrices beside each weight."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """Their product is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of their inputs that is left out in training."""
    towers: TowerTargets = TowerTargets()
    """Which modules."""


MethodSection = LoraSection

"""How the frozen base is adapted."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finetune.recipe.section import PositiveInt, Section


class TowerTarget(Section):
    """What is adapted in one tower; ``r`` and ``lora_alpha`` default to the method's own."""

    target_modules: Literal["all-linear", "none"] | list[str]
    r: PositiveInt | None = None
    lora_alpha: Annotated[float, Field(gt=0)] | None = None


def _tower_target(value: Any) -> Any:
    return {"target_modules": value} if isinstance(value, str | list) else value


Target = Annotated[TowerTarget, BeforeValidator(_tower_target)]


class TowerTargets(Section):
    """Per tower ``all-linear``, ``none``, a list of module names, or a mapping with an ``r`` of its own."""

    language: Target = TowerTarget(target_modules="all-linear")
    projector: Target = TowerTarget(target_modules="none")
    vision: Target = TowerTarget(target_modules="none")


class LoraSection(Section):
    """Low-rank adaptation (Hu et al., https://arxiv.org/abs/2106.09685); option names are PEFT's."""

    name: Literal["lora"]
    r: PositiveInt = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    towers: TowerTargets = TowerTargets()


MethodSection = LoraSection

"""How the frozen base is adapted."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

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
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) (https://arxiv.org/abs/2312.03732)
    use_dora: bool = False  # magnitude and direction apart (https://arxiv.org/abs/2402.09353)
    # learning rate of B over that of A (LoRA+, https://arxiv.org/abs/2402.12354)
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    towers: TowerTargets = TowerTargets()


class PromptTuningSection(Section):
    """Tuned embeddings before the first token (Lester et al., https://arxiv.org/abs/2104.08691)."""

    name: Literal["prompt_tuning"]
    num_virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    prompt_tuning_init_text: str | None = None  # start from these words' embeddings; None: from random tokens'
    lr_ratio: Annotated[float, Field(gt=0)] = 1.0  # times train.learning_rate


class OverridesSection(Section):
    """Whole parameters trained as copies beside the base's own: the projector's, the language tower's norms."""

    name: Literal["overrides"]
    parameters: Annotated[list[Literal["projector", "norms"]], Field(min_length=1)]
    lr_ratio: Annotated[float, Field(gt=0)] = 1.0  # times train.learning_rate


MethodSection = LoraSection | PromptTuningSection | OverridesSection


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict | Section) else value


def _each_once(sections: list[MethodSection]) -> list[MethodSection]:
    names = [section.name for section in sections]
    if len(set(names)) < len(names):
        raise ValueError("a method stands twice; one adapter has each at most once")
    return sections


# One method, or a list of several that make up one adapter.
Methods = Annotated[
    list[Annotated[MethodSection, Field(discriminator="name")]],
    Field(min_length=1),
    BeforeValidator(_as_list),
    AfterValidator(_each_once),
]

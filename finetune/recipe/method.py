"""Sections of the recipe for methods, which adapt the frozen base."""

import re
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from finetune.lookup import did_you_mean
from finetune.recipe.chosen import Choice, as_list
from finetune.recipe.section import PositiveInt, Prompt, Section
from finetune.tables import METHODS_OF_TASKS


def _layers(value: str | list[int]) -> str | list[int]:
    if isinstance(value, str) and not re.fullmatch(r"last [1-9]\d*|\d+-\d+", value):
        raise ValueError(f"layers must be last N, A-B, or a list of numbers from 0, such as last 8; got {value!r}")
    return value


# Layers of a tower: the last ones, a range with both ends, or a list of numbers; the first layer has the number 0.
Layers = Annotated[str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)], AfterValidator(_layers)]


class TowerTarget(Section):
    """The modules that a method adapts in one tower, with settings of their own."""

    target_modules: Literal["all-linear", "none"] | Annotated[list[str], Field(min_length=1)] = Field(
        default="all-linear", examples=[["q_proj", "v_proj"]]
    )
    """``all-linear``, ``none``, or a list of module names."""
    layers: Layers | None = Field(default=None, exclude_if=lambda it: it is None, examples=["last 8"])
    """Layers in which these modules are adapted: last N, A-B, or a list of numbers from 0; by default all."""
    r: PositiveInt | None = Field(default=None, examples=[4])
    """Rank in this tower; by default that of the method."""
    lora_alpha: Annotated[float, Field(gt=0)] | None = Field(default=None, examples=[8])
    """Scale in this tower, as the method's lora_alpha; by default that of the method."""
    lr_ratio: Annotated[float, Field(gt=0)] = Field(default=1.0, examples=[0.1])
    """Factor on train.learning_rate for this tower; LoRA+'s ratio multiplies it."""

    @model_validator(mode="after")
    def _layers_of_something(self) -> "TowerTarget":
        if self.layers is not None and self.target_modules == "none":
            raise ValueError("layers must go with target_modules to adapt, got none. Leave one of them out")
        return self


def _tower_target(value: Any) -> Any:
    return {"target_modules": value} if isinstance(value, str | list) else value


Target = Annotated[
    TowerTarget,
    BeforeValidator(_tower_target, json_schema_input_type=Literal["all-linear", "none"] | list[str] | TowerTarget),
]


class TowerTargets(Section):
    """The targets of each tower: ``all-linear``, ``none``, a list of module names, or a mapping with its own ``r``.

    A base may have other towers than those listed, such as ``fusion``; each is a key of the same kind.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Target] = Field(init=False)

    language: Target = Field(
        default=TowerTarget(target_modules="all-linear"), examples=[{"target_modules": "all-linear", "r": 8}]
    )
    """The modules that are adapted in the language model."""
    projector: Target = Field(default=TowerTarget(target_modules="none"), examples=["all-linear"])
    """The modules that are adapted in the projector, which turns the features of an image into tokens."""
    vision: Target = Field(default=TowerTarget(target_modules="none"), examples=["all-linear"])
    """The modules that are adapted in the vision tower."""

    @model_validator(mode="after")
    def _adapts_one(self) -> "TowerTargets":
        if all(target.target_modules == "none" for _, target in self):
            raise ValueError("at least one tower must be adapted, got none for every tower. Set one to all-linear")
        return self

    def of(self, tower: str) -> TowerTarget:
        """Return the target of a tower, which adapts nothing if the recipe does not name the tower."""
        return dict(self).get(tower, TowerTarget(target_modules="none"))

    def why_not(self, towers: Collection[str]) -> str | None:
        """Return the reason why a base with these towers cannot be adapted, after the section's name; None if it can.

        A base may lack a tower whose target is the default.
        """
        fields = type(self).model_fields
        for tower, target in self:
            if tower not in towers and (tower not in fields or target != fields[tower].default):
                return f".{tower}: the base has no such tower.{did_you_mean(tower, towers)} It has {', '.join(towers)}."
        if all(self.of(tower).target_modules == "none" for tower in towers):
            return (
                f": at least one tower of the base must be adapted, got none for every tower ({', '.join(towers)}). "
                "Set one to all-linear."
            )
        return None


class MethodSection(Section):
    """A method and its options; the base of every method's own section."""

    replaces_parameters: ClassVar[bool] = False  # True if it replaces whole parameters of the base

    name: str
    """The name of the method."""

    @property
    def adapted_towers(self) -> set[str]:
        """The towers whose outputs change."""
        raise NotImplementedError


class LoraSection(MethodSection):
    """Low-rank adaptation (Hu et al., https://arxiv.org/abs/2106.09685); option names are PEFT's."""

    name: Literal["lora"]
    """The name of the method."""
    r: PositiveInt = Field(default=16, examples=[8])
    """Rank of the two small matrices beside each weight."""
    lora_alpha: Annotated[float, Field(gt=0)] = Field(default=32, examples=[16])
    """Numerator of the scale: the product of the two matrices is multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, examples=[0.05])
    """Share of the inputs of the two matrices that is dropped in training."""
    use_rslora: bool = False
    """True for the scale lora_alpha / sqrt(r) instead (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """True to train each weight's magnitude apart from its direction (https://arxiv.org/abs/2402.09353)."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] = Field(default=1.0, examples=[16.0])
    """Learning rate of B divided by that of A (LoRA+, https://arxiv.org/abs/2402.12354)."""
    towers: TowerTargets = Field(
        default=TowerTargets(), examples=[{"language": "all-linear", "projector": "all-linear", "vision": "none"}]
    )
    """The modules that are adapted in each tower."""

    @property
    def adapted_towers(self) -> set[str]:
        """The towers whose outputs change."""
        return {name for name, target in self.towers if target.target_modules != "none"}


class PromptTuningSection(MethodSection):
    """Tuned embeddings before the first token (Lester et al., https://arxiv.org/abs/2104.08691)."""

    name: Literal["prompt_tuning"]
    """The name of the method."""
    num_virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = Field(default=16, examples=[32])
    """Length of the prompt, in tokens."""
    prompt_tuning_init_text: Prompt | None = Field(default=None, examples=["Answer in one word."])
    """The text whose embeddings the prompt starts from; by default it starts from those of random tokens."""
    lr_ratio: Annotated[float, Field(gt=0)] = Field(default=1.0, examples=[10.0])
    """Factor on train.learning_rate for the prompt."""

    @property
    def adapted_towers(self) -> set[str]:
        """The towers whose outputs change."""
        return {"language"}


class FullModulesSection(MethodSection):
    """Full training of copies of the base's parameters: all of the projector, or the norms of the language tower."""

    replaces_parameters = True

    name: Literal["full_modules"]
    """The name of the method."""
    parameters: Annotated[list[Literal["projector", "norms"]], Field(min_length=1)]
    """The parameters that are copied: all of the projector, or the norms of the language tower."""
    layers: Layers | None = Field(default=None, exclude_if=lambda it: it is None, examples=["last 8"])
    """Layers of the language tower whose norms are copied: last N, A-B, or a list of numbers from 0; by default all."""
    lr_ratio: Annotated[float, Field(gt=0)] = Field(default=1.0, examples=[0.1])
    """Factor on train.learning_rate for the copies."""

    @model_validator(mode="after")
    def _layers_of_norms(self) -> "FullModulesSection":
        if self.layers is not None and "norms" not in self.parameters:
            raise ValueError("layers must go with norms in parameters, which has none. Leave layers out")
        return self

    @property
    def adapted_towers(self) -> set[str]:
        """The towers whose outputs change."""
        return {"projector" if part == "projector" else "language" for part in self.parameters}


class HeadSection(MethodSection):
    """A linear head in the place of the base's language head. A task brings it, and no recipe names it."""

    replaces_parameters = True

    name: Literal["head"] = "head"
    """The name of the method."""
    num_outputs: PositiveInt
    """Number of values that the head gives for each token."""
    lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Factor on train.learning_rate for the head."""

    @property
    def adapted_towers(self) -> set[str]:
        """The towers whose outputs change."""
        return {"language"}


_Part = Annotated[SerializeAsAny[MethodSection], Choice("methods", without=METHODS_OF_TASKS)]


def _each_once(sections: list[MethodSection]) -> list[MethodSection]:
    names = [section.name for section in sections]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"a method must be unique, but {twice!r} is given twice. Remove one of them")
    return sections


# One method, or a list of several that make up one adapter; none if the task adds all parts that train.
Methods = Annotated[
    list[_Part],
    BeforeValidator(as_list, json_schema_input_type=_Part | list[_Part]),
    AfterValidator(_each_once),
]

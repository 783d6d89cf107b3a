"""A recipe: everything a run does, as one frozen record read from YAML. Imports no torch."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from finetune.errors import RecipeError
from finetune.example import Message, ask
from finetune.interfaces import TOWERS
from finetune.lookup import did_you_mean, look_up
from finetune.tables import METHODS, SOURCES, TASKS

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: frozen, typed strictly, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSection(Section):
    """Which base, and how it is held in memory."""

    name_or_path: str  # "pocket", a folder, or a hub id
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the base; the adapter trains in float32
    device: str = "auto"  # "auto", "cpu", "cuda", "mps"


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


class JsonlData(Section):
    """Rows in JSON Lines files beside their pictures."""

    source: Literal["jsonl"]
    root: str  # folder that the files and the pictures' paths are relative to
    train: str = "train.jsonl"
    val: str | None = "val.jsonl"
    test: str | None = "test.jsonl"
    image: str = "image"  # field names in a row
    question: str = "question"
    answer: str = "answer"
    kind: str | None = None  # field that names the question type; None: the question, where there are a few
    max_rows: dict[Literal["train", "val", "test"], PositiveInt] = {}  # the first rows by a seeded shuffle
    max_image_pixels: PositiveInt = 50_000_000


class ProceduralData(Section):
    """Rows drawn by a program from a seed: synthetic, for the demo and for tests."""

    source: Literal["procedural"]
    name: Literal["medical", "retail"]
    seed: int = 0
    rows: dict[Literal["train", "val", "test"], PositiveInt] = {"train": 2000, "val": 200, "test": 800}


class TaskSection(Section):
    """How questions are put and answers judged. The adapter carries this, and ``.ask`` repeats it exactly."""

    name: Literal["vqa"] = "vqa"
    system_prompt: str | None = None
    question_template: str = "{question}"
    max_new_tokens: PositiveInt = 16
    answer_normalization: Literal["vqa"] = "vqa"

    @model_validator(mode="after")
    def _has_its_place(self) -> "TaskSection":
        if self.question_template.count("{question}") != 1:
            raise ValueError("question_template must hold {question} exactly once")
        return self

    def ask(self, question: str) -> list[Message]:
        """Returns the messages that put ``question``, with one picture before it."""
        return ask(self.question_template.replace("{question}", question), system_prompt=self.system_prompt)


class TrainSection(Section):
    """The optimisation. One optimizer step sees batch_size x gradient_accumulation_steps x processes rows."""

    epochs: Annotated[float, Field(gt=0)] | None = None  # exactly one of epochs and max_steps
    max_steps: PositiveInt | None = None  # optimizer steps
    batch_size: PositiveInt = 16  # rows of a micro-batch on one process
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Fraction = 0.03  # of all optimizer steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    eval_steps: PositiveInt | None = None  # optimizer steps between validations; None: every epoch
    eval_batch_size: PositiveInt = 32
    early_stopping_patience: PositiveInt | None = None  # validations without a better score
    logging_steps: PositiveInt = 10
    num_workers: Annotated[int, Field(ge=0)] = 0
    output_dir: str = "runs"  # the run's folder is output_dir/name

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of epochs and max_steps")
        return self


class AdapterSection(Section):
    """Where the finished adapter goes, and what its manifest says of it."""

    publish: Annotated[str, Field(pattern=r"^[a-z0-9-]+/[a-z0-9-]+$")] | None = None  # "namespace/name"
    aliases: list[str] = []
    license: str | None = None
    intended_use: str | None = None


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9-]*[a-z0-9])?$", max_length=64)]
    domain: Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9-]*[a-z0-9])?$", max_length=64)]
    seed: int = 0
    model: ModelSection
    method: LoraSection
    data: Annotated[JsonlData | ProceduralData, Field(discriminator="source")]
    task: TaskSection = TaskSection()
    train: TrainSection
    adapter: AdapterSection = AdapterSection()

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.train.output_dir) / self.name

    def identity(self) -> dict[str, Any]:
        """Returns the recipe without what only says where things lie on this machine."""
        data = self.model_dump(mode="json")
        del data["model"]["name_or_path"], data["model"]["device"], data["train"]["output_dir"]
        data["data"].pop("root", None)
        return data


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: a key given twice is refused, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file.
        overrides: ``key.subkey=value`` strings, applied in order before environment variables are expanded;
            values are YAML.

    Raises:
        RecipeError: naming the file and the key, with what is allowed.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_recipe(raw, source=str(path))


def parse_recipe(raw: dict[str, Any], *, source: str) -> Recipe:
    """Builds a recipe from plain data; ``source`` names it in errors."""
    raw = _expand(raw, source, "")
    for section, table in (("method", METHODS), ("task", TASKS)):
        if isinstance(part := raw.get(section), dict) and isinstance(name := part.get("name"), str):
            look_up(table, name, what=f"{section}.name in {source}", error=RecipeError)
    if isinstance(part := raw.get("data"), dict) and isinstance(name := part.get("source"), str):
        look_up(SOURCES, name, what=f"data.source in {source}", error=RecipeError)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors()]
        raise RecipeError(f"{source}: " + f"\n{source}: ".join(problems)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override {override!r}: write key.subkey=value, such as train.learning_rate=5e-4")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from None
    place = raw
    for part in parts[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise RecipeError(f"override {override!r}: {part} is not a section")
    place[parts[-1]] = value


def _expand(value: Any, source: str, key: str) -> Any:
    if isinstance(value, dict):
        return {k: _expand(v, source, f"{key}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, source, f"{key}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise RecipeError(
                f"{source}: {key}: the environment variable {name} is not set. Set it, or override the key: {key}=VALUE"
            )
        return os.environ[name]

    return _VARIABLE.sub(variable, value)


def _explain(error: Any) -> str:
    """Turns one pydantic error into a line that names the key and what is allowed."""
    location = [str(part) for part in error["loc"] if part not in ("jsonl", "procedural")]
    key = ".".join(location) or "top level"
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(error["loc"][:-1])
        return f"{key}: unknown key.{did_you_mean(location[-1], allowed)} Allowed here: {', '.join(allowed)}."
    if error["type"] == "missing":
        return f"{key}: missing; it has no default."
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f" Got {error['input']!r}."
    return f"{key}: {message}.{got}"


def _fields_at(location: Sequence[int | str]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "": Recipe,
        "model": ModelSection,
        "method": LoraSection,
        "method.towers": TowerTargets,
        "data.jsonl": JsonlData,
        "data.procedural": ProceduralData,
        "task": TaskSection,
        "train": TrainSection,
        "adapter": AdapterSection,
        **{f"method.towers.{tower}": TowerTarget for tower in TOWERS},
    }
    section = sections.get(".".join(str(part) for part in location))
    return list(section.model_fields) if section else []

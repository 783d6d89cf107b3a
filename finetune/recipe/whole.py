"""The whole recipe, with the sections of its output."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, model_serializer, model_validator

from finetune.core.fields import Text
from finetune.recipe.data import DataSection
from finetune.recipe.method import Methods, MethodSection
from finetune.recipe.model import ModelSection
from finetune.recipe.objective import Objectives, ObjectiveSection, objective_of
from finetune.recipe.section import Place, Section, Seed
from finetune.recipe.task import AnyTask, task_of
from finetune.recipe.train import TrainSection
from finetune.tables import DEFAULT_TASK


class AdapterSection(Section):
    """The finished adapter: the place where it is published, and texts for its manifest."""

    publish: Annotated[str, Field(pattern=r"^[a-z0-9-]+/[a-z0-9-]+$")] | None = Field(
        default=None, examples=["medical/brain-mri"]
    )
    """``namespace/name`` in the registry, of small letters, digits and hyphens; by default it is not published."""
    aliases: list[str] = Field(default=[], examples=[["prod"]])
    """Aliases that point to the new version, besides ``latest``."""
    init_from: Annotated[Place, Field(max_length=65_536)] | None = Field(default=None, examples=["medical/brain-mri@3"])
    """A finished adapter whose weights the new one starts from: a reference or a folder; by default it starts fresh."""
    license: Text | None = Field(default=None, examples=["apache-2.0"])
    """License of the adapter, as an SPDX identifier."""
    intended_use: Text | None = Field(default=None, examples=["Answers about photographs of clothing; not for people."])
    """The purpose of the adapter, and its limits."""


class Recipe(Section):
    """A recipe: everything that a run does."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9-]*[a-z0-9])?$", max_length=64)] = Field(
        examples=["brain-mri"]
    )
    """Name of the run and of its folder: small letters, digits and hyphens."""
    domain: Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9-]*[a-z0-9])?$", max_length=64)] = Field(
        examples=["medical"]
    )
    """The domain of the images: small letters, digits and hyphens."""
    seed: Seed = Field(default=0, examples=[1])
    """Seed of the fresh adapter's weights, the order of rows and all other random choices."""
    model: ModelSection = Field(examples=[{"name_or_path": "pocket"}])
    """The base model, and the way it is held in memory."""
    method: Methods = Field(examples=[{"name": "lora", "r": 8}])
    """The methods that adapt the base: one, or a list of several that make up one adapter."""
    data: DataSection = Field(examples=[{"source": "jsonl", "root": "data/clothing"}])
    """The source of the rows."""
    task: AnyTask = Field(default_factory=task_of, examples=[{"name": DEFAULT_TASK, "max_new_tokens": 8}])
    """The task: how rows become prompts, and how predictions are compared."""
    objective: Objectives | None = Field(default=None, examples=[{"name": "cross_entropy"}])
    """The objectives that are minimised: one, or a list of several with weights; by default the task's own."""
    train: TrainSection = Field(examples=[{"epochs": 3, "learning_rate": 2e-4}])
    """The settings of training."""
    adapter: AdapterSection = Field(default=AdapterSection(), examples=[{"publish": "retail/clothing"}])
    """The finished adapter: the place where it is published, and texts for its manifest."""
    _from_environment: frozenset[str] = PrivateAttr(frozenset())

    @property
    def from_environment(self) -> frozenset[str]:
        """The texts that hold an environment variable's value; a run does not publish them."""
        return self._from_environment

    def holding(self, from_environment: frozenset[str]) -> "Recipe":
        """Return the recipe with the texts that hold an environment variable's value."""
        new = self.model_copy()
        new._from_environment = from_environment
        return new

    @property
    def parts(self) -> list[MethodSection]:
        """The methods that are trained: the recipe's, and those that the task adds."""
        return [*self.method, *self.task.parts]

    @model_validator(mode="after")
    def _trains_each_part_once(self) -> Self:
        brought = [part.name for part in self.task.parts]
        if twice := next((name for name in brought if brought.count(name) > 1), None):
            raise ValueError(
                f"a part of task {self.task.name} must be unique, but {twice!r} is given twice. Remove one from the "
                "task's parts"
            )
        if both := {part.name for part in self.method} & {*brought}:
            raise ValueError(
                f"method must not name {min(both)}, because task {self.task.name} adds it. Remove it from method"
            )
        if not self.parts:
            raise ValueError("method must name at least one method, got none. Set one, such as {name: lora}")
        return self

    @property
    def objectives(self) -> list[ObjectiveSection]:
        """The objectives that are minimised: those that are named, else the task's own."""
        return [*self.objective] if self.objective else [objective_of(self.task.objective)]

    @model_serializer(mode="wrap")
    def _without_the_tasks_own(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A recipe that names the task's own objective must have the same digest as one that names none.
        data: dict[str, Any] = write(self)
        if self.objectives == [objective_of(self.task.objective)]:
            data.pop("objective", None)
        return data

    @property
    def run_folder(self) -> Path:
        """The run's folder as an absolute path, so that a printed path can be used from any folder."""
        return Path(self.train.output_dir).expanduser().absolute() / self.name

    def identity(self) -> dict[str, Any]:
        """Return the recipe without the keys that only name places, or set how a run is logged and saved."""
        data = self.model_dump(mode="json")
        del data["model"]["name_or_path"], data["model"]["device"], data["adapter"]["init_from"]
        for key in (
            "output_dir",
            "logging_steps",
            "trackers",
            "save_steps",
            "save_total_limit",
            "resume",
            "num_workers",
            "num_threads",
            "feature_store_max_bytes",
        ):
            del data["train"][key]
        parts = [part["data"] for part in data["data"].get("sources", {}).values()]
        for section in (data["data"], *parts):
            section.pop("root", None)
        return data

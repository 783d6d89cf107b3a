"""A whole recipe."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from finetune.recipe.data import DataSection
from finetune.recipe.method import MethodSection
from finetune.recipe.model import ModelSection
from finetune.recipe.section import Section
from finetune.recipe.task import TaskSection
from finetune.recipe.train import TrainSection


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
    method: MethodSection
    data: DataSection
    task: TaskSection = TaskSection()
    train: TrainSection
    adapter: AdapterSection = AdapterSection()

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.train.output_dir) / self.name

    def identity(self) -> dict[str, Any]:
        """Returns the recipe without what only says where things lie, and how a run is watched and kept."""
        data = self.model_dump(mode="json")
        del data["model"]["name_or_path"], data["model"]["device"]
        for key in (
            "output_dir",
            "logging_steps",
            "trackers",
            "save_steps",
            "save_total_limit",
            "resume",
            "num_workers",
        ):
            del data["train"][key]
        data["data"].pop("root", None)
        return data

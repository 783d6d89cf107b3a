"""A recipe: everything a run does, as one frozen record read from YAML. Imports no torch."""

from finetune.recipe.data import DataSection, JsonlData, ProceduralData
from finetune.recipe.method import LoraSection, MethodSection, TowerTarget, TowerTargets
from finetune.recipe.model import ModelSection
from finetune.recipe.reading import load_recipe, parse_recipe, read_value
from finetune.recipe.section import Section
from finetune.recipe.task import TaskSection
from finetune.recipe.train import TrainSection
from finetune.recipe.whole import AdapterSection, Recipe

__all__ = [
    "AdapterSection",
    "DataSection",
    "JsonlData",
    "LoraSection",
    "MethodSection",
    "ModelSection",
    "ProceduralData",
    "Recipe",
    "Section",
    "TaskSection",
    "TowerTarget",
    "TowerTargets",
    "TrainSection",
    "load_recipe",
    "parse_recipe",
    "read_value",
]

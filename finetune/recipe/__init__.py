"""A recipe: everything a run does, as one frozen record read from YAML. Imports no torch."""

from finetune.recipe.data import DataSection, JsonlData, ProceduralData
from finetune.recipe.method import (
    LoraSection,
    MethodSection,
    OverridesSection,
    PromptTuningSection,
    TowerTarget,
    TowerTargets,
)
from finetune.recipe.model import ModelSection, Quantization
from finetune.recipe.pairing import refuse_impossible, why_impossible
from finetune.recipe.reading import load_recipe, parse_recipe
from finetune.recipe.section import Section
from finetune.recipe.task import ContrastiveSection, TaskSection, VqaSection
from finetune.recipe.train import TrainSection
from finetune.recipe.whole import AdapterSection, Recipe

__all__ = [
    "AdapterSection",
    "ContrastiveSection",
    "DataSection",
    "JsonlData",
    "LoraSection",
    "MethodSection",
    "ModelSection",
    "OverridesSection",
    "ProceduralData",
    "PromptTuningSection",
    "Quantization",
    "Recipe",
    "Section",
    "TaskSection",
    "TowerTarget",
    "TowerTargets",
    "TrainSection",
    "VqaSection",
    "load_recipe",
    "parse_recipe",
    "refuse_impossible",
    "why_impossible",
]

"""A recipe: everything a run does, as one frozen record read from YAML. Imports no torch."""

from finetune.recipe.compatibility import refuse_incompatible, why_incompatible
from finetune.recipe.data import (
    ColumnData,
    DataSection,
    HubData,
    JsonlData,
    MixData,
    ParquetData,
    ProceduralData,
    ReadSection,
    RowsSection,
    SavedData,
    StreamableData,
)
from finetune.recipe.method import (
    FullModulesSection,
    HeadSection,
    Layers,
    LoraSection,
    MethodSection,
    PromptTuningSection,
    TowerTarget,
    TowerTargets,
)
from finetune.recipe.model import AttnImplementation, ModelSection, Quantization
from finetune.recipe.objective import ContrastiveObjectiveSection, CrossEntropySection, ObjectiveSection, objective_of
from finetune.recipe.recipe_file import load_recipe, parse_recipe, read_value
from finetune.recipe.section import Section
from finetune.recipe.task import (
    CAPTION_QUESTION,
    AnswerSection,
    LabelSection,
    PromptSection,
    QuestionSection,
    TaskSection,
    task_of,
    tasks_for,
)
from finetune.recipe.train import TrainSection
from finetune.recipe.whole import AdapterSection, Recipe

__all__ = [
    "CAPTION_QUESTION",
    "AdapterSection",
    "AnswerSection",
    "AttnImplementation",
    "ColumnData",
    "ContrastiveObjectiveSection",
    "CrossEntropySection",
    "DataSection",
    "FullModulesSection",
    "HeadSection",
    "HubData",
    "JsonlData",
    "LabelSection",
    "Layers",
    "LoraSection",
    "MethodSection",
    "MixData",
    "ModelSection",
    "ObjectiveSection",
    "ParquetData",
    "ProceduralData",
    "PromptSection",
    "PromptTuningSection",
    "Quantization",
    "QuestionSection",
    "ReadSection",
    "Recipe",
    "RowsSection",
    "SavedData",
    "Section",
    "StreamableData",
    "TaskSection",
    "TowerTarget",
    "TowerTargets",
    "TrainSection",
    "load_recipe",
    "objective_of",
    "parse_recipe",
    "read_value",
    "refuse_incompatible",
    "task_of",
    "tasks_for",
    "why_incompatible",
]

"""The protocols and small records by which families, methods, data, tasks and training meet."""

from finetune.interfaces.families import GenerativeFamily, ModelFamily, PaddingSide, Towers
from finetune.interfaces.methods import Attachment, Host, Method, Part, Update
from finetune.interfaces.objectives import CoupledObjective, LossSum, Objective, Outputs, StepContext
from finetune.interfaces.tasks import (
    BoundedMetric,
    CorpusMetric,
    Metric,
    PreparedTask,
    Prompts,
    RowLengths,
    RowMetric,
    RowsTask,
    RowTokens,
    Task,
    TaskCollator,
)

__all__ = [
    "Attachment",
    "BoundedMetric",
    "CorpusMetric",
    "CoupledObjective",
    "GenerativeFamily",
    "Host",
    "LossSum",
    "Method",
    "Metric",
    "ModelFamily",
    "Objective",
    "Outputs",
    "PaddingSide",
    "Part",
    "PreparedTask",
    "Prompts",
    "RowLengths",
    "RowMetric",
    "RowTokens",
    "RowsTask",
    "StepContext",
    "Task",
    "TaskCollator",
    "Towers",
    "Update",
]

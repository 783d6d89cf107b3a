"""Visual question answering: generated answers, compared by exact match after normalization."""

from typing import Literal

from finetune.recipe import PromptSection
from finetune.tasks.generative import GenerativeTask


class VqaConfig(PromptSection):
    """The section of the VQA task. The adapter keeps it, and ``.ask`` uses it unchanged."""

    name: Literal["vqa"] = "vqa"
    """The name of the task."""


class VqaTask(GenerativeTask):
    """The VQA task: questions about images, with short answers."""

    Config = VqaConfig

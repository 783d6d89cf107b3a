"""Visual question answering: answers are generated, and compared by exact match after normalization."""

from typing import Literal

from finetune.recipe import PromptSection
from finetune.tasks.generative import GenerativeTask


class VqaConfig(PromptSection):
    """The section of the VQA task. The adapter carries this, and ``.ask`` repeats it exactly."""

    name: Literal["vqa"] = "vqa"
    """The name of the task."""


class VqaTask(GenerativeTask):
    """The VQA task: questions about images, with short answers."""

    Config = VqaConfig

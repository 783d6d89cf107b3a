"""Visual question answering: answers are generated, and compared by exact match after normalization."""

from typing import Literal

from finetune.recipe import PromptSection
from finetune.tasks.generative import GenerativeTask


class VqaConfig(PromptSection):
    """How questions are put and answers compared. The adapter carries this, and ``.ask`` repeats it exactly."""

    name: Literal["vqa"] = "vqa"
    """The task."""


class VqaTask(GenerativeTask):
    """Questions about images, with short answers."""

    Config = VqaConfig

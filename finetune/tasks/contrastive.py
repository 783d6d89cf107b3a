"""Contrastive training of a dual encoder on pairs of an image and a text; it answers with the closest label."""

from typing import Literal

from finetune.recipe import LabelSection
from finetune.tasks.choosing import ChoosingTask


class ContrastiveConfig(LabelSection):
    """The section of the contrastive task. The adapter carries this, and ``.classify`` repeats it exactly."""

    objective = "contrastive"

    name: Literal["contrastive"]
    """The name of the task."""


class ContrastiveTask(ChoosingTask):
    """The contrastive task: labels of images, each put into a text."""

    Config = ContrastiveConfig

"""Contrastive training of a dual encoder on pairs of an image and a text; it answers with the closest label."""

from typing import Literal

from finetune.recipe import LabelSection
from finetune.tasks.choosing import ChoosingTask


class ContrastiveConfig(LabelSection):
    """The section of the contrastive task. The adapter keeps it, and ``.classify`` uses it unchanged."""

    objective = "contrastive"

    name: Literal["contrastive"]
    """The name of the task."""


class ContrastiveTask(ChoosingTask):
    """The contrastive task: images with labels, each label written as a text."""

    Config = ContrastiveConfig

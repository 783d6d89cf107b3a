"""Images and texts that belong together: a dual encoder is trained on pairs, and answers with the closest label."""

from typing import Literal

from finetune.recipe import LabelSection
from finetune.tasks.choosing import ChoosingTask


class ContrastiveConfig(LabelSection):
    """How images and texts are brought together. The adapter carries this, and ``.classify`` repeats it exactly."""

    objective = "contrastive"

    name: Literal["contrastive"]
    """The task."""


class ContrastiveTask(ChoosingTask):
    """Labels of images, each put into a text."""

    Config = ContrastiveConfig

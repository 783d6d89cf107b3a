"""Everything that can be known before the slow part of a command, in order of its cost. Imports no torch.

A run: names, paths of the data, registry and signing key, the run's folder, files of the base, first rows. The targets
of its method need torch and are checked by ``finetune.build.base_of``, before rows and weights are read.

An adapter that is used: the reference, the base, the image.
"""

from finetune.preflight.places import check_output_folder, check_output_place, check_registry
from finetune.preflight.run import check_comparison, check_rates, check_recipe
from finetune.preflight.use import check_adapter, check_image, check_question

__all__ = [
    "check_adapter",
    "check_comparison",
    "check_image",
    "check_output_folder",
    "check_output_place",
    "check_question",
    "check_rates",
    "check_recipe",
    "check_registry",
]

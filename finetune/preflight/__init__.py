"""Checks before the slow part of a command, the cheapest first. Imports no torch.

For a run: names, paths of the data, registry and signing key, the run's folder, files of the base, first rows. The
targets of its method need torch. ``finetune.assemble.loading.base_of`` checks them before rows and weights are read.

For an adapter in use: the reference, the base, the image.
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

"""Parameter-efficient fine-tuning of vision-language models: train adapters, register them, swap them at run time.

Public names are imported when they are first used, so that ``import finetune`` loads no torch.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.adapters.reference import AdapterRef
    from finetune.evaluation.compare import evaluate
    from finetune.export.exporting import export_adapter
    from finetune.plugins import register
    from finetune.recipe import Recipe, load_recipe
    from finetune.registry import AdapterRegistry
    from finetune.runs.train import train
    from finetune.serving.loading import load
    from finetune.serving.vision_language_model import VisionLanguageModel

_NAMES = {
    "AdapterRef": "finetune.adapters.reference:AdapterRef",
    "AdapterRegistry": "finetune.registry:AdapterRegistry",
    "Recipe": "finetune.recipe:Recipe",
    "VisionLanguageModel": "finetune.serving.vision_language_model:VisionLanguageModel",
    "evaluate": "finetune.evaluation.compare:evaluate",
    "export_adapter": "finetune.export.exporting:export_adapter",
    "load": "finetune.serving.loading:load",
    "load_recipe": "finetune.recipe:load_recipe",
    "register": "finetune.plugins:register",
    "train": "finetune.runs.train:train",
}

__all__ = [
    "AdapterRef",
    "AdapterRegistry",
    "Recipe",
    "VisionLanguageModel",
    "evaluate",
    "export_adapter",
    "load",
    "load_recipe",
    "register",
    "train",
]


# PEFT imports bitsandbytes, which on some CPUs warns of a kernel that is faster and that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    from finetune.core.extras import missing_extras_named
    from finetune.lookup import import_string

    if name not in _NAMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    with missing_extras_named():
        return import_string(_NAMES[name])


def __dir__() -> list[str]:
    return sorted(__all__)

"""The family of any other class of `AutoModelForImageTextToText`, with towers under transformers' usual names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import ModelError
from finetune.families.image_text_to_text import ImageTextToTextFamily
from finetune.interfaces import Towers

if TYPE_CHECKING:
    from torch import nn

    from finetune.interfaces import Towers

# The names of towers in transformers' own models, the more specific name first.
_LANGUAGE = ("language_model", "text_model", "model.layers")
_PROJECTOR = ("multi_modal_projector", "connector", "aligner", "merger", "projector", "qformer", "mm_projector")
_VISION = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower", "vqmodel")


class GenericFamily(ImageTextToTextFamily):
    """A family that looks for each tower below the model's core; a projector may be inside the vision tower.

    Args:
        model_type: the ``model_type`` in the config.
    """

    def __init__(self, model_type: str):
        self.model_type = model_type  # type: ignore[misc]

    def towers(self, model: nn.Module) -> Towers:
        """Return the modules of each tower.

        Raises:
            ModelError: the model has no language or no vision tower under a known name; the message lists its parts.
        """
        names = [name for name, _ in model.named_modules() if name.count(".") <= 2]
        language, projector, vision = (_find(names, known) for known in (_LANGUAGE, _PROJECTOR, _VISION))
        if not language or not vision:
            missing, known = ("language", _LANGUAGE) if not language else ("vision", _VISION)
            top = sorted({".".join(name.split(".")[:2]) for name in names if name.startswith("model.")} or set(names))
            raise ModelError(
                f"{type(model).__name__} ({self.model_type}) must have a {missing} tower named {', '.join(known)}. Its "
                f"parts are: {', '.join(top)}. Add a family for it to finetune/families."
            )
        found = {"language": language, "projector": projector, "vision": _outside(model, vision, projector)}
        return {tower: paths for tower, paths in found.items() if paths}


def _find(names: list[str], known: tuple[str, ...]) -> tuple[str, ...]:
    for wanted in known:
        matches = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
        if matches:
            return (min(matches, key=lambda name: name.count(".")),)
    return ()


def _outside(model: nn.Module, vision: tuple[str, ...], projector: tuple[str, ...]) -> tuple[str, ...]:
    """Return the vision tower without the projector, if the projector is inside it."""
    (tower,) = vision
    if not any(path.startswith(f"{tower}.") for path in projector):
        return vision
    children = [f"{tower}.{name}" for name, _ in model.get_submodule(tower).named_children()]
    return tuple(child for child in children if not any(path == child for path in projector))

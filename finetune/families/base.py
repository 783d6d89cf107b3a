"""What all families of `AutoModelForImageTextToText` share; a family file states only what differs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from finetune.errors import ModelError
from finetune.lookup import did_you_mean, import_string, look_up
from finetune.tables import EMBEDDED_BASES, FAMILIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.interfaces import ModelFamily, PaddingSide, Towers


class ImageTextToTextFamily:
    """A generative family. Subclasses set ``model_type`` and ``tower_paths``.

    Does not assume that a processor takes pictures as one flat list or as a list per row: see
    ``images_per_row``.
    """

    model_type: ClassVar[str]
    tower_paths: ClassVar[Towers]
    images_per_row: ClassVar[bool]  # whether the processor wants [[picture, ...], ...] or one flat list

    def load(
        self, name_or_path: str, *, revision: str | None, dtype: str, device: str
    ) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Returns the frozen model in eval mode on ``device``, and its processor."""
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                name_or_path,
                revision=revision,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                use_safetensors=True,
            )
            processor = AutoProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{name_or_path}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        if processor.chat_template is None:
            raise ModelError(f"{name_or_path}: its processor has no chat template, so no question can be put")
        model.requires_grad_(False)
        model.to(device)  # type: ignore[arg-type]  # transformers types `to` wrongly
        return model.eval(), processor

    def towers(self, model: nn.Module) -> Towers:
        """Returns ``tower_paths`` after checking that the model has them."""
        names = {name for name, _ in model.named_modules()}
        for tower, paths in self.tower_paths.items():
            for path in paths:
                if path not in names:
                    raise ModelError(
                        f"{type(model).__name__} has no module {path!r}, where {self.model_type} keeps its "
                        f"{tower} tower.{did_you_mean(path, names)}"
                    )
        return self.tower_paths

    def encode(
        self,
        processor: ProcessorMixin,
        texts: Sequence[str],
        images: Sequence[list[Image]],
        *,
        padding_side: PaddingSide,
    ) -> dict[str, Tensor]:
        """Returns input_ids and attention_mask [B, T] and the tensors of the pictures."""
        nested = [list(row) for row in images]
        flat = [image for row in nested for image in row]
        batch = processor(
            text=list(texts),
            images=(nested if self.images_per_row else flat) if flat else None,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return dict(batch)


def embedded_path(name_or_path: str) -> str:
    """Returns the folder of a base that comes with the package, and any other name unchanged."""
    target = EMBEDDED_BASES.get(name_or_path)
    return str(import_string(target)()) if target else name_or_path


def family_of(name_or_path: str, *, revision: str | None = None) -> ModelFamily:
    """Returns the family of a model by its config's ``model_type``.

    Raises:
        ModelError: there is no such model, or no family for it.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no model at {name_or_path!r}: {first_line} Give a folder, a hub id, or one of the embedded bases: "
            f"{', '.join(EMBEDDED_BASES)}."
        ) from None
    target = look_up(FAMILIES, config.model_type, what="model_type", error=ModelError)
    return import_string(target)()

"""The protocols of families of models.

Legend of shapes: B rows, T tokens, V vocabulary, D values of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.core.batch import ImageStep, Rendered
    from finetune.recipe import AttnImplementation, Quantization

PaddingSide = Literal["left", "right"]


# Tower -> full paths of its modules. Most models have "language", "projector" and "vision"; a model may have others,
# such as "fusion". A tower that it does not have has no key.
Towers = Mapping[str, tuple[str, ...]]


class ModelFamily(Protocol):
    """A model family: loading, towers, inputs and outputs, which depend on the base's ``model_type``."""

    model_type: str
    architecture: str  # of its models: generative, dual_encoder, or another word
    media: frozenset[str]  # the types of media that its models take, such as image
    auto_class: Any  # the class of transformers that loads its models

    def load(
        self,
        name_or_path: str,
        *,
        revision: str | None,
        dtype: str,
        device: str,
        quantization: Quantization | None,
        attn_implementation: AttnImplementation,
    ) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Return the frozen model in eval mode, and its processor."""
        ...

    def skeleton(self, name_or_path: str, *, revision: str | None = None) -> PreTrainedModel:
        """Return the model on the meta device: names and shapes, and no weights."""
        ...

    def towers(self, model: nn.Module) -> Towers:
        """Return the modules that make up each tower of ``model``."""
        ...

    def encode(
        self, processor: ProcessorMixin, rows: Sequence[Rendered], *, padding_side: PaddingSide
    ) -> dict[str, Any]:
        """Return the model's inputs for rendered rows, whose media have types that the model takes."""
        ...

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs that answers are read from, [B, rows, values]: logits of tokens, or embeddings."""
        ...


class GenerativeFamily(ModelFamily, Protocol):
    """A family that generates text."""

    def mark_supervised(self, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the inputs of a training batch, with marks of the supervised tokens where the model needs them."""
        ...

    def image_step(self, processor: ProcessorMixin, images: list[Image]) -> ImageStep:
        """Process the images of one row, for its features.

        Raises:
            ModelError: this processor has no image step of its own, so its rows cannot have features.
        """
        ...

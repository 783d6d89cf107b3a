"""Batches for a model: input tensors, supervised tokens, image features and placeholders of tuned prompts.

Legend of shapes: B rows, T tokens, N supervised tokens or placeholders, D values of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from finetune.core.hollow import mapped as moved
from finetune.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from finetune.core.example import Example


@dataclass(frozen=True)
class Targets:
    """The N supervised tokens of a batch [B, T], as positions among its B * T tokens."""

    predictors: Tensor  # [N] the position before each token; its output predicts the token
    tokens: Tensor  # [N] ids

    @classmethod
    def of(cls, labels: Tensor) -> Targets:
        """Return the targets of ``labels`` [B, T], without the first token of a row: no output predicts it."""
        supervised = labels != -100
        supervised[:, 0] = False
        places = supervised.flatten().nonzero().squeeze(1)
        return cls(places - 1, labels.flatten()[places])


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model.

    ``inputs`` are the model's keyword arguments. ``labels`` is None for rows without supervision, and -100 where
    nothing is supervised. For tokens it holds their ids, [B, T]; for a dual encoder 0 for a supervised pair, [B]. The
    collator and the objectives of another task choose its form, with B first.
    """

    inputs: dict[str, Any]  # tensors; ``STORED_OUTPUTS`` holds some
    examples: list[Example]
    labels: Tensor | None = None
    # Found in the labels [B, T] when the batch is made: a search on a GPU would wait for the device.
    targets: Targets | None = None

    def __post_init__(self) -> None:
        if self.targets is None and self.labels is not None and self._is_per_token(self.labels):
            object.__setattr__(self, "targets", Targets.of(self.labels))

    def _is_per_token(self, labels: Tensor | None) -> bool:
        """Return whether labels have one entry a token, as ``input_ids`` [B, T] have."""
        ids = self.inputs.get("input_ids")
        return labels is not None and ids is not None and labels.shape == ids.shape

    def to(self, device: Any, dtype: torch.dtype) -> Batch:
        """Return the batch with its tensors on ``device``, images in the model's ``dtype``."""
        batch = replace(self, labels=None)._of_each(
            lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
        )
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return replace(batch, labels=labels)

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the batch's tensors."""
        found: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            found.append(tensor.nbytes)
            return tensor

        self._of_each(count)
        return sum(found)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; a DataLoader calls this method by its name."""
        return self._of_each(lambda tensor: tensor.pin_memory())

    def _of_each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with ``function`` applied to each of its tensors."""

        def mapped(value: Any) -> Any:
            match value:
                case Mapping():
                    return {name: mapped(part) for name, part in value.items()}
                case list():
                    return [mapped(part) for part in value]
                case None:
                    return None
                case _:
                    return moved(value, function)

        targets = self.targets and Targets(mapped(self.targets.predictors), mapped(self.targets.tokens))
        return Batch(mapped(self.inputs), self.examples, mapped(self.labels), targets)


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features of one row: the outputs of the base's frozen modules, and the processor's outputs for the images.

    Attributes:
        outputs: the full name of a frozen module -> the tensors of its output for the row. A tensor that no later
            module reads is hollow.
        per_token: the modules whose outputs have one entry for each token of the row, [1, T, ...]. All others have
            entries for images, tiles or patches in their first dimension.
        processed: the processor's outputs for the images, each a list or a tensor with the row's entries; pixels are
            hollow.
        replacements: the text that replaces each image's placeholder.
    """

    outputs: Mapping[str, tuple[Tensor, ...]]
    per_token: frozenset[str] = frozenset()
    processed: Mapping[str, Any]
    replacements: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ImageStep:
    """The images of one row after the processor's image step.

    Attributes:
        inputs: the model's inputs for a row of these images alone.
        processed: the outputs of the image step, as ``Features`` holds them.
        replacements: the text that replaces each image's placeholder.
    """

    inputs: dict[str, Any]
    processed: Mapping[str, Any]
    replacements: tuple[str, ...]


STORED_OUTPUTS = "stored_outputs"  # the input of a model that holds the features of a batch, for ``Replay``

# An opened medium of a row: an image, or the features that replace the row's images.
OpenedMedium: TypeAlias = "Image | Features"


@dataclass(frozen=True)
class Rendered:
    """One row as a family takes it: its text and its media.

    Attributes:
        text: the text that the chat template renders; None where only the media are used, as a dual encoder allows.
        media: the opened media, in order; features of the row's images are one entry that replaces all of them.
    """

    text: str | None
    media: tuple[OpenedMedium, ...] = ()


@dataclass(frozen=True)
class Placeholders:
    """The places that a tuned prompt fills, between the left padding and the first real token of a row.

    The model sees ordinary ids there, so it builds its own positions and masks; only their embeddings are replaced.
    """

    num_virtual_tokens: int
    token_id: int

    def insert(self, batch: Batch) -> Batch:
        """Return the batch with every tensor that has one entry a token made longer by ``num_virtual_tokens``."""
        mask = batch.inputs["attention_mask"]
        width = mask.shape[1]
        first = mask.argmax(dim=1, keepdim=True)  # [B, 1]
        column = mask.new_tensor(range(width + self.num_virtual_tokens))[None, :]  # [1, T + N]
        new = (column >= first) & (column < first + self.num_virtual_tokens)  # [B, T + N]
        source = column - (column >= first + self.num_virtual_tokens) * self.num_virtual_tokens
        source = source.clamp(max=width - 1).expand_as(new)
        fills = {"input_ids": self.token_id, "attention_mask": 1, **dict.fromkeys(PER_TOKEN, 0)}

        def longer(tensor: Tensor, fill: int) -> Tensor:
            index, where = source, new
            for size in tensor.shape[2:]:
                index, where = (x.unsqueeze(-1).expand(*x.shape, size) for x in (index, where))
            return tensor.gather(1, index).masked_fill(where, fill)

        for name, value in batch.inputs.items():
            if name not in fills and getattr(value, "shape", None) == mask.shape and not value.is_floating_point():
                raise MethodError(
                    "a tuned prompt must know the value of its placeholders in each input with one entry a token, but "
                    f"this model takes the unknown input {name!r} [B, T]. Use another method, such as lora."
                )
        inputs = {name: longer(t, fills[name]) if name in fills else t for name, t in batch.inputs.items()}
        labels = batch.labels
        labels = longer(labels, -100) if labels is not None and batch._is_per_token(labels) else labels
        return Batch(inputs, batch.examples, labels)

    def remove(self, batch: Batch) -> Batch:
        """Return the batch that ``insert`` was given, on its present device.

        The first token of a row must not be supervised: without placeholders no output predicts it. Collators make no
        such row.
        """
        mask = batch.inputs["attention_mask"]  # [B, T + N]
        longer = mask.shape[1]
        width = longer - self.num_virtual_tokens
        first = mask.argmax(dim=1, keepdim=True)  # [B, 1]
        column = torch.arange(width, device=mask.device)[None, :]  # [1, T]
        source = column + (column >= first) * self.num_virtual_tokens  # [B, T]

        def shorter(tensor: Tensor) -> Tensor:
            index = source
            for size in tensor.shape[2:]:
                index = index.unsqueeze(-1).expand(*index.shape, size)
            return tensor.gather(1, index)

        per_token = {"input_ids", "attention_mask", *PER_TOKEN}
        inputs = {name: shorter(value) if name in per_token else value for name, value in batch.inputs.items()}
        targets = batch.targets
        if targets is not None:  # moved and not searched: a search on a GPU would wait for the device
            row, place = targets.predictors // longer, targets.predictors % longer
            place = place - (place >= first.squeeze(1)[row]) * self.num_virtual_tokens
            targets = Targets(row * width + place.clamp(min=0), targets.tokens)
        labels = batch.labels
        labels = shorter(labels) if labels is not None and batch._is_per_token(labels) else labels
        return Batch(inputs, batch.examples, labels, targets)


def join_prompts(batches: Sequence[Batch], *, pad_id: int) -> Batch:
    """Return the rows of several batches without labels as one batch, left-padded to the longest.

    Args:
        batches: batches from ``prompt_batch`` of one collator, each with inputs of its own length [B_i, T_i].
        pad_id: the token id of padding.

    Returns:
        Inputs with one entry a token are [sum of B_i, max of T_i, ...]. All others belong to media. Where they differ
        in size beyond their first dimension, zeros fill the end of the smaller ones, as image processors do it.
    """
    if len(batches) == 1:
        return batches[0]
    fills = {"input_ids": pad_id, "attention_mask": 0, **dict.fromkeys(PER_TOKEN, 0)}
    inputs: dict[str, Any] = {}
    for name in dict.fromkeys(name for batch in batches for name in batch.inputs):
        found = [batch.inputs[name] for batch in batches if name in batch.inputs]
        if name in fills:
            width = max(batch.inputs["input_ids"].shape[1] for batch in batches)
            inputs[name] = torch.cat([_grown(one, {1: width}, fills[name], left=True) for one in found])
        elif isinstance(found[0], list):
            inputs[name] = [entry for one in found for entry in one]
        else:
            sizes = dict(enumerate(map(max, zip(*(one.shape[1:] for one in found), strict=True)), 1))
            inputs[name] = torch.cat([_grown(one, sizes, 0) for one in found])
    return Batch(inputs, [example for batch in batches for example in batch.examples])


def _grown(tensor: Tensor, sizes: Mapping[int, int], fill: int, *, left: bool = False) -> Tensor:
    """Return a tensor padded to ``sizes`` of some dimensions, at their end or at their beginning."""
    for dim, size in sizes.items():
        if missing := size - tensor.shape[dim]:
            shape = [*tensor.shape]
            shape[dim] = missing
            padding = tensor.new_full(shape, fill)
            tensor = torch.cat([padding, tensor] if left else [tensor, padding], dim=dim)
    return tensor


# Inputs with one entry a token, beside ids and mask. A placeholder has 0 there, the value of a text token.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")

"""The language head only where something is learnt: most of a row's tokens are the picture's and the question's."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


def logits_at(model: nn.Module, inputs: dict[str, Any], places: Tensor) -> Tensor:
    """Returns the logits [N, V] that a forward gives at some of the B * T places of a batch.

    The head is given these places alone, inside of the model's own forward: what comes after it (soft caps, scales)
    is computed as ever. Where a model has no head of its own, or puts more than the rows' tokens through it, all its
    logits are computed.

    Args:
        model: as the loop runs it; it may be wrapped for several processes.
        inputs: of a batch [B, T].
        places: [N].
    """
    shape = inputs["input_ids"].shape
    with _head_at(model, places, shape):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.flatten(0, 1)[places] if logits.shape[:2] == shape else logits[0]


def why_all_logits(model: Any) -> str | None:
    """Returns what is told of a model whose head cannot be given single places; None where it can."""
    if model.get_output_embeddings() is not None:
        return None
    return f"{type(model).__name__} names no language head, so logits of every token are computed, learnt or not"


@contextmanager
def _head_at(model: Any, places: Tensor, shape: tuple[int, ...]) -> Iterator[None]:
    def gather(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, *rest = args  # [B, T, D]
        return (hidden.flatten(0, 1)[places][None], *rest) if hidden.shape[:2] == shape else None

    while not hasattr(model, "get_output_embeddings"):
        model = model.module  # it is wrapped
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(gather) if head is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()

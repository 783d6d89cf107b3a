"""Logits only at supervised tokens, since most tokens of a row belong to the image and the question.

Tokens depend on each other only in attention. The parts after the attention of the last layer (its output projection,
the feed-forward part, the last norm, the head) work token by token. Tokens that are not supervised do not need them:
their values reach no loss, and their gradients are zero.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


def logits_at(model: nn.Module, inputs: dict[str, Any], places: Tensor) -> Tensor:
    """Return the logits [N, V] that a forward gives at some of the B * T places of a batch.

    Inside the model's own forward, the head and the parts between the last attention and the head compute only these
    places. Later operations (soft caps, scales) run as usual. A model without a head, or with other tokens in its
    head, computes all logits.

    Args:
        model: the model of the training loop; it may be wrapped for several processes.
        inputs: the inputs of a batch [B, T].
        places: the places of the wanted logits in the batch's B * T, [N].
    """
    shape = inputs["input_ids"].shape
    whole: Any = model
    while not hasattr(whole, "get_output_embeddings"):
        whole = whole.module  # unwrap
    with ExitStack() as narrowed:
        if (head := whole.get_output_embeddings()) is not None:
            narrowed.enter_context(_narrowed(head, places, shape, widen=False))
            for module in _after_the_last_attention(whole):
                narrowed.enter_context(_narrowed(module, places, shape, widen=True))
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.flatten(0, 1)[places] if logits.shape[:2] == shape else logits[0]


def why_all_logits(model: Any) -> str | None:
    """Return the reason why a model computes all logits, for the user; None if it does not."""
    if model.get_output_embeddings() is not None:
        return None
    return f"{type(model).__name__} names no language head, so it computes the logits of all tokens"


def _after_the_last_attention(model: Any) -> list[nn.Module]:
    """Return the parts of the last layer that work token by token, if they have the usual names."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers:
        return []
    last = layers[-1]
    if last._compiled_call_impl is not None:
        return []  # hooks that come and go would compile it again
    projection = getattr(getattr(last, "self_attn", None), "o_proj", None)
    forward = getattr(last, "mlp", None)
    # A mixture of experts also returns the routing of its tokens, so its output is not one tensor.
    return [*([projection] if projection else []), *([forward] if hasattr(forward, "down_proj") else [])]


@contextmanager
def _narrowed(module: nn.Module, places: Tensor, shape: tuple[int, ...], *, widen: bool) -> Iterator[None]:
    """Let a module compute only some of the B * T places of its input, [1, N, D]; other inputs stay unchanged.

    Args:
        module: the module, which takes [B, T, D].
        places: the numbers of the places, [N].
        shape: the shape of the batch, (B, T).
        widen: True to return [B, T, D], zero at the other places; False to return [1, N, D].
    """
    gathered = False

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal gathered
        hidden, *rest = args
        gathered = hidden.shape[:2] == shape
        return (hidden.flatten(0, 1)[places][None], *rest) if gathered else None

    def scatter(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not gathered:
            return output
        (found,) = output  # [N, D]
        empty = found.new_zeros(shape[0] * shape[1], found.shape[-1])
        return empty.index_copy(0, places, found).unflatten(0, shape)

    handles = [module.register_forward_pre_hook(gather)]
    if widen:
        handles.append(module.register_forward_hook(scatter))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

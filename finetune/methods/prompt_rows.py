"""The placement of a tuned prompt in the rows of a batch, in training and finished."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from finetune.errors import AdapterError, MethodError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from finetune.core.batch import Placeholders

CHILD = "tuned_prompt"  # of the input embedding, while it trains


class Frame(NamedTuple):
    """The arguments of the whole model's forward that its input embedding needs."""

    begins: bool = True  # True if the inputs begin with the first token of the rows
    mask: Any = None  # attention mask [B, T]

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> Frame:
        """Return the frame of a forward with these arguments."""
        cache = kwargs.get("past_key_values")
        return cls(cache is None or int(cache.get_seq_length()) == 0, kwargs.get("attention_mask"))


class TrainedPrompt(nn.Module):
    """The prompt [N, D] in training, a child of the input embedding, and the hooks that put it into the rows."""

    def __init__(self, model: PreTrainedModel, embedding: nn.Module, prompt: nn.Parameter, places: Placeholders):
        super().__init__()
        self.prompt, self.places, self.on = prompt, places, True
        self._frame = Frame()
        self._embedding = [embedding]  # in a list, so that it does not become a child of its own child
        self._handles = [
            model.register_forward_pre_hook(self._note, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
            embedding.register_forward_hook(self._fill),
        ]
        embedding.add_module(CHILD, self)

    def leave(self) -> None:
        """Take the prompt and its hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        del self._embedding[0]._modules[CHILD]

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._frame = Frame.of(kwargs)

    def _forget(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._frame = Frame()

    def _fill(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.on:
            return output
        # Training builds its own rows, so it skips the check, which waits for the device.
        return fill(args[0], output, self.prompt, self.places, self._frame, check=not self.training)


# Of the forward that runs in this context.
_FRAME: ContextVar[Frame] = ContextVar("finetune_frame", default=Frame())  # noqa: B039


class FrameUpdate:
    """An update of the whole model that passes the arguments of its forward to the input embedding.

    Args:
        module: the whole model.
    """

    num_bytes = 0

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the model's own output."""
        token = _FRAME.set(Frame.of(kwargs))
        try:
            return inner(*args, **kwargs)
        finally:
            _FRAME.reset(token)

    def merging(self, name: str) -> Callable[[], None]:
        """Return a function that changes nothing."""
        return lambda: None


class PromptUpdate:
    """A finished prompt in the rows of the input embedding.

    Args:
        module: the input embedding.
        prompt: the prompt, fp32 [N, D].
        places: the placeholders that the prompt fills.
    """

    def __init__(self, module: nn.Module, prompt: Tensor, places: Placeholders):
        self.module, self.prompt, self.places = module, prompt, places

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the tensors that the update holds beside the base."""
        return self.prompt.nbytes

    def __call__(self, inner: Callable[..., Tensor], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [B, T, D] for ids [B, T]."""
        output = inner(ids, *args, **kwargs)
        return fill(ids, output, self.prompt, self.places, _FRAME.get(), check=True)

    def merging(self, name: str) -> Callable[[], None]:
        """Raise MethodError, since no weight can hold a prompt."""
        raise MethodError(
            "a tuned prompt cannot be merged, since it is part of the rows and not of the weights. Use the adapter "
            "without merging."
        )


def fill(ids: Tensor, output: Tensor, prompt: Tensor, places: Placeholders, frame: Frame, *, check: bool) -> Tensor:
    """Replace the embeddings of the placeholders of each row; later steps of a generation have none.

    Args:
        ids: the token ids, [B, T].
        output: the embeddings of the ids, [B, T, D].
        prompt: the prompt, [N, D].
        places: the placeholders that the prompt fills.
        frame: the arguments of the whole model's forward.
        check: True to refuse rows without placeholders, which waits for the device.

    Raises:
        AdapterError: a row does not begin with the placeholders.
    """
    if not frame.begins or ids.ndim != 2:
        return output
    if isinstance(frame.mask, torch.Tensor) and frame.mask.shape == ids.shape:
        first = frame.mask.int().argmax(dim=1, keepdim=True)  # [B, 1], the first token that is no padding
    else:
        first = (ids == places.token_id).int().argmax(dim=1, keepdim=True)
    columns = first + torch.arange(places.num_virtual_tokens, device=ids.device)  # [B, N]
    if check and (columns.max() >= ids.shape[1] or (ids.gather(1, columns) != places.token_id).any()):
        raise AdapterError(
            f"each row must begin with the {places.num_virtual_tokens} placeholders of the active prompt, and one does "
            "not. Make inputs with prompt_batch(), or call ask()."
        )
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(columns)
    return output.index_put((rows, columns), prompt.to(output.dtype).expand(len(ids), -1, -1))

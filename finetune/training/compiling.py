"""torch.compile of the repeated layers: each layer of the language tower is compiled by itself.

The layers have one class, so all use the code that is compiled for the first one. Compiling takes as long as for one
layer. Each layer keeps its place and its name in the model.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.other import is_repeated_blocks

from finetune.errors import TrainingError
from finetune.training.replay import replays

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from torch import nn


class CompiledLayers:
    """A context in which the layers run compiled; inside a ``paused`` block they run as they are.

    Generation is not compiled: with a cache every call has another shape, and compiling each would take longer.

    Args:
        model: the model that holds the layers.
        paths: the full names of the modules that hold the layers; None compiles nothing.

    Raises:
        TrainingError: the model has no repeated layers.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str] | None):
        lists = [
            module
            for path in paths or ()
            for module in model.get_submodule(path).modules()
            if is_repeated_blocks(module)
        ]
        inner = {id(child) for blocks in lists for child in blocks.modules() if child is not blocks}
        # A layer that replays stored outputs computes nothing in training.
        self.layers: list[Any] = [
            layer for blocks in lists if id(blocks) not in inner for layer in blocks.children() if not replays(layer)
        ]
        if paths is not None and not self.layers:
            raise TrainingError(
                "train.torch_compile needs a base with repeated layers, and this base has none. Set it to false."
            )

    def __enter__(self) -> CompiledLayers:
        for layer in self.layers:
            layer.compile()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        for layer in self.layers:
            layer._compiled_call_impl = None  # Module.compile sets it, and torch has no method that undoes this
        if self.layers and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise TrainingError(
                "train.torch_compile: torch cannot compile the layers on this machine: "
                f"{str(error).strip().splitlines()[0].rstrip('.')}. Set it to false."
            ) from error

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run a block with the layers as they are."""
        if not self.layers:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

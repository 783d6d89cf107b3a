"""torch.compile of the repeated layers: each layer of the language tower is compiled by itself.

They are of one kind, so what is compiled for the first serves the others, and compiling takes as long as for one
layer. Each keeps its place and its name in the model.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.other import is_repeated_blocks

from finetune.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from torch import nn


class CompiledLayers:
    """A context in which the layers run compiled; inside a ``paused`` block they run as they are.

    Generating is left as it is: a cache makes every call one of another kind, and compiling each would take longer.

    Args:
        model: the model that holds the layers.
        paths: the full names of the modules that hold the layers; None compiles nothing.

    Raises:
        TrainingError: there are no repeated layers.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str] | None):
        lists = [
            module
            for path in paths or ()
            for module in model.get_submodule(path).modules()
            if is_repeated_blocks(module)
        ]
        inner = {id(child) for blocks in lists for child in blocks.modules() if child is not blocks}
        self.layers: list[Any] = [layer for blocks in lists if id(blocks) not in inner for layer in blocks.children()]
        if paths is not None and not self.layers:
            raise TrainingError("train.torch_compile: this base has no repeated layers to compile. Set it to false.")

    def __enter__(self) -> CompiledLayers:
        for layer in self.layers:
            layer.compile()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        for layer in self.layers:
            layer._compiled_call_impl = None  # what Module.compile has set; torch has no word for the opposite
        if self.layers and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise TrainingError(
                f"train.torch_compile: the layers cannot be compiled here: {str(error).strip().splitlines()[0]} "
                "Set it to false."
            ) from error

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run a block with the layers as they are."""
        if not self.layers:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

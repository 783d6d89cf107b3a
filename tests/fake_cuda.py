"""A CUDA device that this machine need not have: torch's fake tensors stand for those on ``cuda``.

Fake tensors check devices, dtypes and shapes as a GPU would, but hold no values, so code that reads one (a generated
token, the size of an image in patches) would stop. Here each of their operations also runs on real tensors on the CPU,
which answer what is read. What is on the CPU stays real.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_any, tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Sequence

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class FakeCuda(TorchDispatchMode):
    """A block in which ``cuda`` can be used; a tensor on the CPU beside one on ``cuda`` is an error, as on a GPU.

    It does not cover gradients: autograd asks the driver for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=False)
        self._answers = _Answers()
        self._patch = mock.patch.object(nn.Module, "to", lambda *args, **kwargs: self._move(*args, **kwargs))

    def __enter__(self) -> FakeCuda:
        self._patch.start()
        self._answers.__enter__()
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)
        self._answers.__exit__(*error)
        self._patch.stop()

    def _move(self, module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Do what ``nn.Module.to`` does: it would swap the contents of tensors, which fake ones do not allow."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)

        def moved(tensor: Tensor) -> Any:
            return tensor.detach().to(device, dtype if tensor.is_floating_point() else None)

        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and (new := moved(parameter)) is not parameter:
                    value = getattr(new, "value", None)
                    part._parameters[name] = nn.Parameter(new, parameter.requires_grad)
                    part._parameters[name].value = value  # type: ignore[union-attr]
            part._buffers.update({name: moved(buffer) for name, buffer in part._buffers.items() if buffer is not None})
        return module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = tree_map(_on_the_cpu, (args, kwargs))
        if not tree_any(_is_on_cuda, (args, kwargs)):
            return self._compute(func, values)
        args, kwargs = tree_map(lambda part: self._made(part, CPU) if _is_real(part) else part, (args, kwargs))
        try:
            found = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._read(func, (args, kwargs), values)
        real = self._compute(func, values)
        for fake, value in zip(tree_leaves(found), tree_leaves(real), strict=True):
            # What a kernel keeps for its gradient has another shape and dtype on each device, and is not read.
            if isinstance(fake, FakeTensor) and fake.shape == value.shape:
                with _disable_current_modes():
                    fake.value = value.to(fake.dtype)
        return tree_map(lambda part: part.value if _is_fake_on_cpu(part) else part, found)

    def _compute(self, func: Any, values: Any) -> Any:
        with _disable_current_modes():
            return func(*values[0], **values[1])

    def _read(self, func: Any, arguments: Any, values: Any) -> Any:
        """Return the result of an operation that depends on values, or whose size does."""
        tensors = [part for part in tree_leaves(arguments) if isinstance(part, Tensor)]
        devices = {tensor.device for tensor in tensors if tensor.ndim}
        assert len(devices) <= 1, f"{func} reads tensors on {devices}"
        found = self._compute(func, values)
        return tree_map(lambda part: self._made(part, tensors[0].device) if _is_real(part) else part, found)

    def _made(self, real: Tensor, device: torch.device) -> Any:
        """Return the fake tensor of a real one."""
        with _disable_current_modes():
            real = real.detach()
            fake: Any = self._fake.from_tensor(real)
            if device != fake.device:
                with self._fake:
                    fake = fake.to(device)
        fake.value = real
        return fake


class _Answers(TorchFunctionMode):
    """Answers functions whose own code would ask the driver for the device, and keeps values beside new data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            return _which_have_gradients(*args, **kwargs)
        if func is torch.tensor and (found := [part for part in tree_leaves(args[0]) if isinstance(part, Tensor)]):
            kwargs = {"dtype": found[0].dtype, **kwargs}
            args = (tree_map(lambda part: part.tolist() if isinstance(part, Tensor) else part, args[0]), *args[1:])
        if func == Tensor.data.__set__ and isinstance(args[1], FakeTensor):
            args[0].value = args[1].value
        return func(*args, **kwargs)


def _which_have_gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], **options: Any) -> list[Tensor | None]:
    """Return zeros for inputs that the graph of the outputs leads to, and None for the others."""
    nodes, seen, leaves = [output.grad_fn for output in outputs], set(), set()
    while nodes:
        if (node := nodes.pop()) is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        nodes += [following for following, _ in node.next_functions]
    return [torch.zeros_like(tensor) if id(tensor) in leaves else None for tensor in inputs]


def _is_on_cuda(part: Any) -> bool:
    return isinstance(part, FakeTensor) or (isinstance(part, torch.device) and part.type == "cuda")


def _is_real(part: Any) -> bool:
    return isinstance(part, Tensor) and not isinstance(part, FakeTensor)


def _is_fake_on_cpu(part: Any) -> bool:
    return isinstance(part, FakeTensor) and part.device.type == "cpu"


def _on_the_cpu(part: Any) -> Any:
    """Return a fake tensor's value, the CPU for ``cuda``, and anything else unchanged."""
    if isinstance(part, FakeTensor):
        return part.value  # type: ignore[attr-defined]
    return CPU if _is_on_cuda(part) else part

"""FSDP2: each process holds a part of every layer of the language tower, and gets the other parts to compute it.

The weight matrices of its repeated layers are sharded, which is nearly all of a large model. Everything else stays
whole on every process. The adapter stays whole because it is small, so the plain strategy's gradients, optimizer and
checkpoints work unchanged. The vision tower and the projector stay whole because a process whose rows hold no image
never calls them, and the others would wait for it forever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.errors import TrainingError
from finetune.training.replicated import Replicated

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from finetune.interfaces import Attachment, Towers
    from finetune.recipe import TrainSection


class SplitBase(Replicated):
    """Several processes that share one frozen base; every one has to run as many forwards and backwards as the others.

    The base is loaded to the CPU and sharded there, so that a device never holds all of it.
    """

    lockstep = True

    @property
    def load_device(self) -> str:
        """The device that the base is loaded on."""
        return "cpu"

    def split(self, model: nn.Module, towers: Towers) -> None:
        """Shard the layers of the language tower over the processes, and move the rest to the device.

        Raises:
            TrainingError: the language tower has no repeated layers.
        """
        device = self.accelerator.device
        layers: list[Any] = [
            module
            for path in towers.get("language", ())
            for module in model.get_submodule(path).modules()
            if isinstance(module, GradientCheckpointingLayer)
        ]
        if not layers:
            raise TrainingError(
                f"FSDP2 needs a base with repeated layers to shard, and {type(model).__name__} has none. Use "
                "recipes/accelerate/ddp.yaml, where each process holds the whole base."
            )
        self._first_layer = layers[0]
        # Norms and biases stay whole: they are small, and methods read them outside a forward.
        whole = set(model.parameters()) - {p for layer in layers for p in layer.parameters() if p.ndim > 1}
        mesh = init_device_mesh(device.type, (self.accelerator.num_processes,))
        reshard = self.accelerator.state.fsdp_plugin.reshard_after_forward
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, ignored_params=whole)
        # The model itself has nothing left to shard. As the common root it gathers one layer ahead of the other.
        fully_shard(model, mesh=mesh, ignored_params=whole)
        model.to(device)
        for layer in layers:
            # The first gathering creates the tensors that every later one fills. A generation would create them in
            # inference mode, and training could not use them.
            layer.unshard()
            layer.reshard()

    def prepare(
        self, model: nn.Module, attachment: Attachment, optimizer: torch.optim.Optimizer, options: TrainSection
    ) -> None:
        """Take over the adapter and its optimizer."""
        self.model, self.attachment, self.optimizer = model, attachment, optimizer
        with torch.no_grad():
            for parameter in attachment.parameters.values():
                parameter.copy_(broadcast(parameter.detach().clone()))  # every process has drawn its own weights
        # Rows without an image may reach no parameter that trains. Their process still has to run backward through
        # every layer, together with the others.
        self._anchor = torch.ones((), device=self.accelerator.device, requires_grad=True)
        self._first_layer.register_forward_pre_hook(self._ask_for_gradient, with_kwargs=True)

    def _ask_for_gradient(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not torch.is_grad_enabled():
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden * self._anchor.to(hidden.dtype)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def backward(self, loss: Callable[[], Tensor], *, last: bool) -> None:
        """Run one micro-batch forward and backward; the base has no gradient, so there is nothing to synchronise."""
        loss().backward()
        self._anchor.grad = None

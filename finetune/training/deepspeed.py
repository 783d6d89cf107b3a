"""DeepSpeed's ZeRO: an engine owns the optimizer, and shards its state, the gradients and, at stage 3, the base.

This file calls the engine itself. accelerate's wrapper steps inside the last backward pass, but the gradients must be
checked before a step. https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from finetune.data.stream import Stream
from finetune.errors import TrainingError
from finetune.training.replicated import Replicated

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from accelerate import Accelerator
    from torch import Tensor

    from finetune.data.stream import Rows
    from finetune.interfaces import Attachment
    from finetune.recipe import TrainSection


class DeepSpeed(Replicated):
    """Several processes under an engine, which must know the last micro-batch of a step, and then steps once.

    The base is loaded whole by every process, so that it can be evaluated; the engine shares it out afterwards.
    """

    lockstep = True

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self._gradients: dict[nn.Parameter, Tensor | None] = {}
        self._plugin: Any = accelerator.state.deepspeed_plugin
        # At stage 3 transformers would load a base that no forward without the engine could use.
        unset_hf_deepspeed_config()

    @property
    def cuts_base(self) -> bool:
        """True if each process holds only a part of every parameter."""
        return self._plugin.zero_stage == 3

    def check_rows(self, splits: Mapping[str, Rows]) -> None:
        """Refuse rows of which only some have an image, or another type of media.

        The engine sums gradients in buckets, in the order in which they arrive. On a process whose rows have no image,
        the gradients of the vision tower would take another place, and would be added to wrong ones. With a sharded
        base, the other processes would wait forever for its vision tower, in an evaluation too.

        Raises:
            TrainingError: only some rows of a split have a medium of one type.
        """
        for split, rows in splits.items():
            if split != "train" and not self.cuts_base:
                continue
            assert not isinstance(rows, Stream), "refused with the recipe"
            for type in sorted({type for row in rows for type in row.media_types}):
                if without := [row.id for row in rows if type not in row.media_types]:
                    raise TrainingError(
                        f"data.{split}: with DeepSpeed, all rows or none must have a medium of the type {type}, but "
                        f"{len(without)} of {len(rows)} rows have none, such as {without[0]}. Use "
                        "recipes/accelerate/ddp.yaml or fsdp2.yaml."
                    )

    def prepare(
        self, model: nn.Module, attachment: Attachment, optimizer: torch.optim.Optimizer, options: TrainSection
    ) -> None:
        """Hand model and optimizer to the engine, with the recipe's batch size and norm."""
        self.attachment = attachment
        self._plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": options.batch_size,
            "gradient_clipping": options.max_grad_norm or 0.0,
        }
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        set_hf_deepspeed_config(self._plugin.dschf)  # generation reads from it whether processes must keep in step

    def backward(self, loss: Callable[[], Tensor], *, last: bool) -> None:
        """Run one micro-batch forward and backward."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        # The engine divides the sum over processes by their number.
        self.model.backward(loss() * self.accelerator.num_processes)

    def add_up_gradients(self) -> None:
        """Collect the gradients that the engine has summed in the backward passes."""
        whole = importlib.import_module("deepspeed.utils").safe_get_full_grad
        self._gradients = {parameter: whole(parameter) for parameter in self.parameters}

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a whole gradient, or None if it is zero: the engine has one for parameters that no row reached too."""
        gradient = self._gradients[parameter]
        return gradient if gradient is not None and gradient.any() else None

    def clip(self, max_norm: float | None) -> Tensor:
        """Return the norm of the gradients; the engine clips them as it steps."""
        return nn.utils.get_total_norm([gradient for gradient in self._gradients.values() if gradient is not None])

    def step(self) -> None:
        """Make the optimizer step."""
        self.model.step()
        self._gradients.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Return saved name -> whole tensor of the adapter."""
        with self._whole(for_writing=False):
            return {name: p.detach().clone() for name, p in self.attachment.parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Write whole tensors into the adapter, and into the copies that the engine steps on."""
        write = importlib.import_module("deepspeed.utils").safe_set_full_fp32_param
        with self._whole(for_writing=True):
            super().load(tensors)
        for name, parameter in self.attachment.parameters.items():
            write(parameter, tensors[name].to(self.accelerator.device))

    def optimizer_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return parameter name -> slot -> whole tensor; the count of steps is the same for all."""
        read = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
        slots: dict[str, Any] = next(iter(self._engine_optimizer.optimizer.state.values()), {})
        scalars = {slot: tensor for slot, tensor in slots.items() if tensor.ndim == 0}
        return {
            name: {slot: scalars[slot].clone() if slot in scalars else read(parameter, slot) for slot in slots}
            for name, parameter in (self.attachment.parameters.items() if slots else ())
        }

    def load_optimizer(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore the tensors that ``optimizer_tensors`` returned."""
        if not tensors:
            return
        write = importlib.import_module("deepspeed.utils").safe_set_full_optimizer_state
        engine = self._engine_optimizer
        flat = engine.fp32_partitioned_groups_flat if self.cuts_base else engine.single_partition_of_fp32_groups
        slots = next(iter(tensors.values()))
        for vector in flat:  # an optimizer has no state to write to before its first step
            state = {slot: torch.zeros_like(vector) if t.ndim else t.clone() for slot, t in slots.items()}
            engine.optimizer.state[vector] = state
        if not self.cuts_base:
            engine._lazy_init_hp_params_optimizer_state()  # maps parameters to their places in the vectors
        for name, parameter in self.attachment.parameters.items():
            for slot, tensor in tensors[name].items():
                if tensor.ndim:
                    write(parameter, tensor.to(self.accelerator.device), slot)

    def finish(self) -> Attachment:
        """End training, and return the attachment with parameters of its own."""
        whole = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in self.tensors().items()}
        self.attachment.freeze()
        parts = (replace(part, parameters={n: whole[n] for n in part.parameters}) for part in self.attachment.parts)
        return replace(self.attachment, parts=tuple(parts))

    @property
    def _engine_optimizer(self) -> Any:
        """The engine's optimizer in accelerate's wrapper; it wraps the recipe's, which steps on flat vectors."""
        return self.optimizer.optimizer

    def _whole(self, *, for_writing: bool) -> Any:
        gathered = importlib.import_module("deepspeed").zero.GatheredParameters
        return gathered(self.parameters, modifier_rank=0 if for_writing else None)

"""The state of a run, as a checkpoint holds it by name: all values that are needed to continue exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from finetune.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from finetune.training.checkpoint import Checkpoint
    from finetune.training.replicated import Replicated
    from finetune.training.validation import AnyValidation

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")  # their versions may change the numbers


@dataclass
class TrainState:
    """The progress of a run, without weights and generators."""

    batch_size: int  # rows of a micro-batch on one process; fewer than the recipe's after memory ran out
    step: int = 0  # optimizer steps done
    best_score: float | None = None
    best_loss: float | None = None  # of the validation that had the best score
    best_step: int = 0
    validations_without_better: int = 0
    # [step, score, loss], the oldest first; None for a score or loss that is unknown
    validations: list[list[Any]] = field(default_factory=list)

    def note(self, validation: AnyValidation) -> bool:
        """Record the validation of this step, and return whether its weights are the best so far.

        Of two equal validations the later one is chosen, which has trained on more rows. It does not reset the count
        of validations without a better one.
        """
        best = (self.best_score, self.best_loss)
        better = validation.is_better(*best)
        chosen = better or validation.is_as_good(*best)
        self.validations.append([self.step, validation.score, validation.loss])
        self.validations_without_better = 0 if better else self.validations_without_better + 1
        if chosen:
            self.best_score, self.best_loss, self.best_step = validation.score, validation.loss, self.step
        return chosen


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The whole state of a run, as it is written and read.

    The best weights are a copy, so a state does not depend on another file; an adapter is small.
    """

    strategy: Replicated
    state: TrainState
    best: dict[str, Tensor] = field(default_factory=dict)  # parameter name -> weights of the best validation

    def pack(self, random: Mapping[str, Any], *, log_bytes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and facts for a checkpoint; every process has to call it.

        Args:
            random: the random state of this process after the last step.
            log_bytes: the length of the log in bytes.
        """
        adapter = self.strategy.tensors()
        tensors = {f"adapter/{name}": tensor for name, tensor in adapter.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, slots in self.strategy.optimizer_tensors().items():
            tensors |= {f"optimizer/{name}/{slot}": tensor for slot, tensor in slots.items()}
        generators = []
        for rank, process in enumerate(gather_object([dict(random)])):
            held = {name: part for name, part in process.items() if isinstance(part, torch.Tensor)}
            tensors |= {f"random/{rank}/{name}": part for name, part in held.items()}
            generators.append({name: part for name, part in process.items() if name not in held})
        facts = {
            "state": asdict(self.state),
            "trainable": {name: list(tensor.shape) for name, tensor in adapter.items()},
            "random": generators,
            "log_bytes": log_bytes,
            "versions": versions(),
        }
        return tensors, facts

    def unpack(self, checkpoint: Checkpoint, *, process: int) -> dict[str, Any]:
        """Restore the state, and return the random state of ``process``; every process has to call it.

        Args:
            checkpoint: the checkpoint that was read.
            process: the index of this process.

        Raises:
            TrainingError: the checkpoint lacks a value, or its trainable tensors are not those of this run.
        """
        kinds = {"trainable": dict, "state": dict, "random": list, "log_bytes": int, "versions": dict}
        if wrong := [name for name, kind in kinds.items() if type(checkpoint.facts.get(name)) is not kind]:
            raise TrainingError(
                f"{checkpoint.path}: a checkpoint must hold {', '.join(kinds)}, but {wrong[0]} is missing or of "
                "another type. Delete this checkpoint to continue from the one before, or set train.resume: never."
            )
        saved = checkpoint.facts["trainable"]
        own = {name: list(tensor.shape) for name, tensor in self.strategy.tensors().items()}
        if saved != own:
            names = [name for name in dict.fromkeys([*saved, *own]) if saved.get(name) != own.get(name)]
            raise TrainingError(
                f"{checkpoint.path}: the trainable tensors must be those of this run, but {len(names)} differ, such as "
                f"{names[0]} (shape {saved.get(names[0])} in the checkpoint, {own.get(names[0])} in this run). "
                f"Continue with the versions that wrote it ({checkpoint.facts['versions']}), or set train.resume: "
                "never."
            )
        parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "best": {}, "optimizer": {}, "random": {}}
        for key, tensor in checkpoint.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.best.update(parts["best"])
        slots: dict[str, dict[str, Tensor]] = {}
        for key, tensor in parts["optimizer"].items():
            name, _, slot = key.rpartition("/")
            slots.setdefault(name, {})[slot] = tensor
        self.strategy.load_optimizer(slots)
        self.strategy.load(parts["adapter"])
        vars(self.state).update(checkpoint.facts["state"])
        mine = {key.partition("/")[2]: t for key, t in parts["random"].items() if key.startswith(f"{process}/")}
        return {**checkpoint.facts["random"][process], **mine}


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a result may depend on."""
    return {name: version(name) for name in PACKAGES}

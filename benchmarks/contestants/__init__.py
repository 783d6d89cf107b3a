"""The contestants. A contestant is a function that trains as its kind does, and calls the gate after every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# Name -> the function, of a job and a gate.
CONTESTANTS = {
    "trl": "benchmarks.contestants.sft_trainer:run",
    "bare": "benchmarks.contestants.bare:run",
    "ours": "benchmarks.contestants.ours:run",
    "stored": "benchmarks.contestants.ours:run_stored",
    "images": "benchmarks.contestants.ours:run_stored_images",
    "floor": "benchmarks.contestants.floor:run",
}

# Those that run in the environment that ``launch.sh`` starts a recipe in: ours, and what bounds ours from below. The
# others run in the one that the command finds.
LAUNCHED = ("ours", "stored", "images", "floor")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of every contestant.

    Attributes:
        base: the folder of the model.
        rows: the folder of ``train.jsonl``.
        scratch: the contestant's own folder to write in.
        order: the index of each row, step after step; ``batch_size`` of them are a step.
        batch_size: the number of rows of an optimizer step.
        device: ``cpu`` or ``cuda``.
        dtype: the dtype of the frozen weights, by torch's name.
        num_workers: processes that prepare batches on the side.
        launched: whether it runs in the environment that ``launch.sh`` makes.
        projector: whether LoRA adapts the projector too.
        last_layers: the number of upper layers of the language model that LoRA adapts; None for all.
        r: rank of LoRA, on every linear module of these.
        lora_alpha: its scale times r.
        learning_rate: of AdamW, constant and without weight decay.
        max_grad_norm: gradients are clipped to it.
        seed: of the rows' order and of LoRA.
    """

    base: Path
    rows: Path
    scratch: Path
    order: tuple[int, ...]
    batch_size: int
    device: str
    dtype: str
    num_workers: int
    launched: bool
    projector: bool = False
    last_layers: int | None = None
    r: int = 8
    lora_alpha: int = 16
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        return len(self.order) // self.batch_size

    def step_rows(self, step: int) -> tuple[int, ...]:
        """Return the rows of ``step``."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

"""The gate at which a contestant waits for its turn: one continuous run, stopped between rounds."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The message of a contestant before its first step.

    Attributes:
        trainable: the number of trainable parameters.
        fill_seconds: the wall time of the work done once for all epochs; 0 for most contestants.
    """

    trainable: int
    fill_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Round:
    """Some steps in a row.

    Attributes:
        seconds: the wall time.
        cpu_seconds: the user and system time of the process and of its ended children.
        losses: the loss of each step before its update, as the mean over tokens.
        supervised: the number of supervised tokens of each step.
        cuda_bytes: the largest number of bytes that torch had allocated on the GPU; 0 without a GPU.
        flops: the floating-point operations of matrix products and attention, if they were counted; else 0.
    """

    seconds: float
    cpu_seconds: float
    losses: list[float]
    supervised: list[int]
    cuda_bytes: int = 0
    flops: int = 0


@dataclass
class Gate:
    """The gate between a contestant and the measuring process.

    Args:
        connection: the connection to the measuring process.
        steps: the number of optimizer steps of a round.
        counts_flops: whether to count operations in the first round, which warms up: counting takes time.
    """

    connection: Connection
    steps: int
    counts_flops: bool = False
    _begun: tuple[float, float] = (0.0, 0.0)
    _losses: list[Any] = field(default_factory=list)
    _supervised: list[Any] = field(default_factory=list)
    _counter: FlopCounterMode | None = None

    def ready(self, model: nn.Module, *, fill_seconds: float = 0.0) -> None:
        """Report that everything is loaded, and wait for the first round."""
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.connection.send(Ready(trainable=trainable, fill_seconds=fill_seconds))
        self._wait()
        if self.counts_flops:
            self._counter = FlopCounterMode(display=False).__enter__()

    def step(self, loss: float | Tensor, supervised: int | Tensor) -> None:
        """Record a step; at the end of a round report it, and wait for the next."""
        self._losses.append(loss)
        self._supervised.append(supervised)
        if len(self._losses) < self.steps:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = _now()
        flops = 0
        if self._counter:
            self._counter.__exit__(None, None, None)
            flops, self._counter = self._counter.get_total_flops(), None
        self.connection.send(
            Round(
                seconds=wall - self._begun[0],
                cpu_seconds=cpu - self._begun[1],
                losses=[float(loss) for loss in self._losses],
                supervised=[int(count) for count in self._supervised],
                cuda_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
                flops=flops,
            )
        )
        self._losses, self._supervised = [], []
        self._wait()

    def _wait(self) -> None:
        self.connection.recv()
        self._begun = _now()


def _now() -> tuple[float, float]:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)

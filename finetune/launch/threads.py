"""Threads that compute on a CPU: their number, their waiting for each other, and other processes on the same cores.

OpenMP reads its variables when torch is imported, so this module imports no torch.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from finetune.lookup import import_string

if TYPE_CHECKING:
    from collections.abc import Mapping

# Each says how a thread waits for the others. torch's own OpenMP, libgomp, obeys the first two; Intel's, the third.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# A thread spins as long as small operations make it wait, and then sleeps: some 0.1 ms, and 1 ms with Intel's OpenMP.
_SHORT_WAIT = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
_LEAST_SECONDS = 2.0  # of a window in which the use of cores is measured
_LEAST_OTHERS = 0.5  # cores; a desktop at rest uses less
_STAT = Path("/proc/stat")


def waiting_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which waiting threads soon sleep; none if the user chose how they wait.

    By default they spin for milliseconds, and beside other processes each then burns the time that the thread it waits
    for needs. Threads that sleep at once wake too slowly between small operations.
    """
    return {} if any(name in env for name in WAITING) else dict(_SHORT_WAIT)


def set_threads(num_threads: int | Literal["auto"]) -> None:
    """Set this process's number of threads, and how they wait.

    Args:
        num_threads: the recipe's ``train.num_threads``; ``auto`` keeps the number of the environment, or torch's own.
    """
    torch_is_here = "torch" in sys.modules
    if not torch_is_here:
        os.environ.update(waiting_env(os.environ))
    if num_threads == "auto":
        return
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    if torch_is_here:
        import_string("torch:set_num_threads")(num_threads)


class _Use(NamedTuple):
    """The use of the cores that this process may run on, in seconds since some time in the past."""

    wall: float
    own: float
    all: float


class BusyCores:
    """A measurement of how much other processes compute on the cores of this one; on Linux only.

    Args:
        threads: the number of threads of this process.
    """

    def __init__(self, threads: int):
        self.threads, self._explained = threads, False
        self._before = _use()

    def start(self) -> None:
        """Begin a window."""
        self._before = _use()

    def explain(self) -> str | None:
        """Return, once, a line for the user if the cores were busy since the last window began; else None."""
        if self._explained or self._before is None or (now := _use()) is None:
            return None
        seconds = now.wall - self._before.wall
        if seconds < _LEAST_SECONDS:
            return None
        own = (now.own - self._before.own) / seconds
        others = (now.all - self._before.all) / seconds - own
        self._before = now
        cores = len(os.sched_getaffinity(0))
        if others < _LEAST_OTHERS or others + self.threads <= cores + _LEAST_OTHERS:
            return None
        self._explained = True
        # Threads that sleep while they wait get more of a shared core by being more; those that spin lose by it.
        spins = self.threads > 1 and not _sleep_soon(os.environ)
        advice = (
            " Its threads spin while they wait: set OMP_WAIT_POLICY=PASSIVE, or train.num_threads: 1." if spins else ""
        )
        return (
            f"the cores are busy: other processes use {others:.1f} of {cores}, and this run with {self.threads} "
            f"thread{'s' if self.threads > 1 else ''} got {own:.1f}.{advice}"
        )


def _sleep_soon(env: Mapping[str, str]) -> bool:
    return env.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" or _SHORT_WAIT.items() <= env.items()


def _use() -> _Use | None:
    """Return the present use; None on systems that do not tell it."""
    try:
        lines = _STAT.read_text(encoding="ascii").splitlines()
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        per_second = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    busy = 0
    for name, *ticks in (line.split() for line in lines if line.startswith("cpu")):
        if name in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, ticks)
            busy += user + nice + system + irq + softirq + steal
    return _Use(time.monotonic(), time.process_time(), busy / per_second)

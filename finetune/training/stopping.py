"""Stopping a run: Ctrl-C and SIGTERM are recorded, and the run stops between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 1.0  # a launcher repeats the terminal's signal: within this time both are one request


class Stopping:
    """A context in which the first signal is only recorded; the second one ends the process at once.

    A signal that was ignored before (as under nohup) stays ignored. Outside the main thread no signal is handled.

    Args:
        main: whether this process prints the line for the user.
    """

    def __init__(self, *, main: bool = True):
        self.main = main
        self.signum: int | None = None  # the number of the first signal
        self._at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def agreed(self, accelerator: Accelerator) -> int | None:
        """Return the signal that any process has received, the same on all of them, or None."""
        if accelerator.num_processes == 1:
            return self.signum
        mine = torch.tensor([float(self.signum == s) for s in SIGNALS], device=accelerator.device)
        counts = accelerator.reduce(mine, "sum").tolist()
        return next((signum for signum, count in zip(SIGNALS, counts, strict=True) if count), None)

    def _note(self, signum: int, _frame: object) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._at = signum, now
            if self.main:
                os.write(2, b"\nstopping after this step, and saving its state; a second signal stops at once\n")
        elif now - self._at > SAME_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


def farewell(step: int, total_steps: int, kept: Path | None) -> str:
    """Return the last line of a run that stopped, for the user: the step it reached, and how to continue.

    Args:
        step: the number of optimizer steps done.
        total_steps: the number of optimizer steps of the whole run.
        kept: the checkpoint of this step; None if it could not be written.
    """
    where = f"stopped after step {step} of {total_steps}"
    if kept is None:
        return f"{where}; this state is not saved. Start the run again to continue from its last checkpoint, if any."
    return f"{where}; the state is saved in {kept}. Start the run again to continue from there."


def leave_signals_to_the_parent(_worker: int = 0) -> None:
    """Ignore the signals in a DataLoader's worker, which the present step still needs.

    The terminal sends Ctrl-C to every process of the run. A worker ends together with its loader.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)

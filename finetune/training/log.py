"""The log of a run: a bar on the terminal, and JSON lines in the run's folder."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from finetune.core.outside_text import safe_block

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from finetune.launch.threads import BusyCores
    from finetune.training.validation import AnyValidation

_EVERY = 10  # the largest default number of steps between lines
_LINES = 10  # the number of lines of a short run


class RunLog:
    """The log of a run, in ``log.jsonl`` and on the terminal; only the main process shows anything.

    Args:
        folder: the run's folder.
        every: the number of optimizer steps between lines; None for about ten lines over the run, and at least one
            every 10 steps.
        main: whether this is the main process.
        track: the function that takes each line's numbers and its step, such as accelerate's ``log``; None without
            trackers.
        cores: the measurement that tells whether other processes use the cores; None for none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int | None,
        main: bool = True,
        track: Callable[[dict[str, Any], int], None] | None = None,
        cores: BusyCores | None = None,
    ):
        self._asked, self.every, self.main, self.track = every, every or _EVERY, main, track
        self._cores = cores
        self.file = folder / "log.jsonl"
        self.full = False  # whether a line could not be written
        self.bar: tqdm[Any] | None = None
        self._samples = self._tokens = 0
        self._busy = 0.0  # seconds spent in steps since the last line

    @property
    def size(self) -> int:
        """The number of bytes written so far."""
        return self.file.stat().st_size if self.file.exists() else 0

    def start(self, total_steps: int, *, done: int = 0, size: int = 0) -> None:
        """Open the bar, and drop the lines of steps that are repeated.

        Args:
            total_steps: the number of optimizer steps of the whole run.
            done: the number of optimizer steps before this start.
            size: the number of bytes of the log that belong to those steps.
        """
        if self._asked is None:
            self.every = max(1, min(_EVERY, total_steps // _LINES))
        if self.main:
            self.file.touch()
            os.truncate(self.file, min(size, self.size))
        self.bar = tqdm(
            total=total_steps,
            initial=done,
            unit="step",
            desc="training",
            disable=not self.main,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=1.0,
        )
        if self._cores:
            self._cores.start()

    def step(self, step: int, *, samples: int, tokens: int, seconds: float, **values: float) -> None:
        """Log one optimizer step; rates are over the time since the last line, without validation."""
        self._samples += samples
        self._tokens += tokens
        self._busy += seconds
        assert self.bar is not None
        self.bar.update()
        if step % self.every and step != self.bar.total:
            return
        rates = {"samples_per_s": self._samples / self._busy, "tokens_per_s": self._tokens / self._busy}
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {rates['samples_per_s']:.1f} samples/s, {rates['tokens_per_s']:.0f} tokens/s"
        )
        self._write({"step": step, **{k: round(v, 6) for k, v in (values | rates).items()}})
        self._samples = self._tokens = 0
        self._busy = 0.0
        if self._cores and (line := self._cores.explain()):
            self.info(line)

    def validation(self, step: int, validation: AnyValidation, *, best: bool) -> None:
        """Log a validation: a line with ``val.<metric>`` for each metric, and ``val.loss`` if it is finite.

        A validation that ended early has ``val.rows``, the number of its rows, in their place.
        """
        self._write({"step": step, **{f"val.{k}": number for k, number in validation.numbers.items()}, "best": best})
        self.info(f"step {step}: validation {validation.describe()}{' (best so far)' if best else ''}")

    def info(self, text: str) -> None:
        """Print a line above the bar."""
        if self.main:
            tqdm.write(safe_block(text), file=sys.stdout)

    def close(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def _write(self, line: dict[str, Any]) -> None:
        if not self.main:
            return
        if self.track:
            self.track({name: value for name, value in line.items() if name != "step"}, line["step"])
        size = self.size
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            os.truncate(self.file, size)  # no half line
            if not self.full:
                self.info(
                    f"{self.file}: the log cannot be written ({error.strerror}). The run continues; lines are missing "
                    f"from step {line['step']}."
                )
            self.full = True

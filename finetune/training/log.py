"""Progress for people and for programs: a bar on the terminal and one JSON line a step in the run's folder."""

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """Writes ``log.jsonl``; only the main process shows anything.

    Args:
        folder: the run's folder.
        every: optimizer steps between lines.
        main: whether this is the main process.
    """

    def __init__(self, folder: Path, *, every: int, main: bool = True):
        self.every, self.main = every, main
        self.file = folder / "log.jsonl"
        if main:
            self.file.write_text("")
        self.bar: tqdm[Any] | None = None
        self._samples = self._tokens = 0
        self._busy = 0.0  # seconds spent in steps since the last line

    def start(self, total_steps: int) -> None:
        """Opens the bar."""
        self.bar = tqdm(
            total=total_steps,
            unit="step",
            disable=not self.main,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=1.0,
        )

    def step(self, step: int, *, samples: int, tokens: int, seconds: float, **values: float) -> None:
        """Notes one optimizer step; rates are over the time since the last line, validation left out."""
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

    def validation(self, step: int, score: float, better: bool) -> None:
        """Notes a validation."""
        self._write({"step": step, "val_exact_match": round(score, 6), "best": better})
        self.say(f"step {step}: validation exact match {score:.3f}{' (best so far)' if better else ''}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.main:
            tqdm.write(text, file=sys.stdout)

    def finish(self) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self.main:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

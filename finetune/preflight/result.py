"""The result of a finished run, ``result.json``; the run writes it last."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.core.json_file import write_json
from finetune.core.old_names import METRICS, current_names
from finetune.errors import DataError
from finetune.metrics.names import TEST, named_values
from finetune.tables import ANSWER_METRICS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RESULT = "result.json"  # a folder without it holds an unfinished run


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a finished run.

    Attributes:
        ref: the reference in the registry; None where the recipe publishes nothing.
        steps: the number of optimizer steps that made the weights.
        warnings: the notes that a user should read first.
        metric: the metric that chose the weights.
        higher_is_better: True if a higher value of that metric is better.
        val: the value of that metric on the validation rows; None without such rows.
        metrics: the scores on the test rows by name, as in the manifest.
    """

    ref: str | None
    steps: int
    warnings: tuple[str, ...]
    metric: str
    higher_is_better: bool
    val: float | None
    metrics: Mapping[str, Any]

    @property
    def test(self) -> float | None:
        """The value of the metric on the test rows; None without such rows."""
        return named_values(self.metrics).get(f"{TEST}.{self.metric}")

    def write(self, folder: Path) -> None:
        """Write the result into the folder of the run."""
        write_json(folder / RESULT, {**vars(self), "warnings": list(self.warnings)})

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """Return the result in the folder of a run; None if there is none, or it cannot be read."""
        try:
            raw = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            metric = raw.get("metric", ANSWER_METRICS[0])  # each run of release 0.1.0 had this metric
            return cls(
                ref=raw["ref"],
                steps=raw["steps"],
                warnings=tuple(raw["warnings"]),
                metric=metric,
                higher_is_better=raw.get("higher_is_better", True),
                val=raw.get("val", raw.get(f"val.{metric}")),
                metrics=current_names(raw.get("metrics") or {}, METRICS, source=RESULT, error=DataError),
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

"""Several sources as one, each with a share of the rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from finetune.data.splits import read_split, tally

if TYPE_CHECKING:
    from collections.abc import Mapping

    from finetune.core.example import Example
    from finetune.data.bad_rows import BadRows
    from finetune.recipe import MixData, TaskSection


def read_mix(section: MixData, split: str, *, task: TaskSection, seed: int, bad: BadRows) -> list[Example]:
    """Read one split of every source; arguments as for ``read_jsonl``, but ``seed`` chooses the rows to repeat.

    A row's id and question type begin with the name of its source, so that scores are broken down by source. The id of
    a repeated row ends with ``#2``, ``#3`` and so on.
    """
    parts: dict[str, list[Example]] = {}
    for name in section.sources:
        part = section.part(name)
        faults = tally(part, f"{name} {split}", log=bad.log)
        faults.is_part = True
        rows = read_split(part, split, task=task, seed=seed, bad=faults)
        faults.conclude()
        parts[name] = [
            replace(
                example,
                id=f"{name}/{example.id}",
                meta=example.meta | {"question_type": f"{name}/{example.question_type}"},
            )
            for example in rows
        ]
    bad.tried = sum(len(rows) for rows in parts.values())  # each source has logged its own faults
    if split != "train":
        return [example for rows in parts.values() for example in rows]
    weights = {name: part.weight for name, part in section.sources.items()}
    wanted = shares({name: len(rows) for name, rows in parts.items()}, weights)
    return [example for name, rows in parts.items() for example in _repeated(rows, wanted[name], seed=seed)]


def shares(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """Return the number of rows of each source in an epoch: in the ratio of the weights, with no row left out.

    Args:
        sizes: each source -> the number of its rows; a source without rows gets none.
        weights: each source -> its weight, relative to the others.
    """
    unit = max((size / weights[name] for name, size in sizes.items()), default=0)  # rows of weight 1
    return {name: max(size, round(unit * weights[name])) if size else 0 for name, size in sizes.items()}


def _repeated(rows: list[Example], wanted: int, *, seed: int) -> list[Example]:
    """Return ``wanted`` rows: all rows as many times as they fit, then rows that the seed chooses."""
    out: list[Example] = []
    for turn in range(1, math.ceil(wanted / max(1, len(rows))) + 1):
        left = min(len(rows), wanted - len(out))
        order = np.random.default_rng([seed, turn, len(rows)]).permutation(len(rows))[:left]
        out += [rows[i] if turn == 1 else replace(rows[i], id=f"{rows[i].id}#{turn}") for i in sorted(order)]
    return out

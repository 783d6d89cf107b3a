"""The base class of tasks whose predictions are answers; an answer is correct if it equals a reference."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from finetune.tables import ANSWER_METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.recipe import AnswerSection


class AnswerTask:
    """A task that compares answers under the normalization in its section."""

    options: AnswerSection
    metrics: tuple[str, ...] = ANSWER_METRICS

    def most_common_answer(self, examples: Sequence[Example]) -> str:
        """Return the most frequent first reference of the rows, as the first row with it writes it."""
        written: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for example in examples:
            normalized = self.options.normalize(example.answers[0])
            written.setdefault(normalized, example.answers[0])
            counts[normalized] += 1
        return written[counts.most_common(1)[0][0]]

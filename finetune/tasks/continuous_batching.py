"""Greedy answers to many rows: a row leaves the batch at its end, and the next one takes its place.

Rows about the same images share the beginning of their prompts: it goes through the model once.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import torch

from finetune.tasks.cached_rows import CachedRows, Prefix
from finetune.tasks.generation import Answer
from finetune.tasks.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase

    from finetune.core.example import Example
    from finetune.core.prediction import FinishReason
    from finetune.interfaces import Prompts


@dataclass(kw_only=True)
class InFlight:
    """A row that is being answered."""

    row: int
    prompt: list[int]
    limit: int
    ids: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class Group:
    """Rows that begin with the same tokens and images.

    Attributes:
        rows: the numbers of the rows that wait.
        tails: the number of each row -> the ids of its prompt after the last image.
        prefix: the common beginning, once it went through the model.
    """

    rows: deque[int]
    tails: dict[int, list[int]] = field(default_factory=dict)
    prefix: Prefix | None = None

    @cached_property
    def num_shared(self) -> int:
        """The number of ids after the last image that all tails begin with; each tail is longer."""
        tails = list(self.tails.values())
        return min(len(commonprefix(tails)), min(map(len, tails)) - 1)

    def tail(self, row: int) -> list[int]:
        """Return the ids of a row's prompt after the common beginning."""
        return self.tails[row][self.num_shared :]

    def lead(self, cached: CachedRows, place: int, leader: InFlight) -> None:
        """Keep the beginning of a row that just went through the model, for the other rows.

        Args:
            cached: the rows that went through the model.
            place: the number of the leader among them.
            leader: the first row of the group.
        """
        if len(self.tails) < 2:
            return
        tail = self.tails[leader.row]
        if leader.prompt[-len(tail) :] == tail:  # else the processor adds tokens of its own, and nothing is shared
            length = len(leader.prompt) - len(tail) + self.num_shared
            self.prefix = cached.prefix(place, leader.prompt[:length])


def grouped(rows: Sequence[int], examples: Sequence[Example], prompts: Prompts) -> list[Group]:
    """Return the rows in groups that share images, in the order of the first row of each.

    Args:
        rows: the numbers of the rows.
        examples: all rows.
        prompts: the inputs of rows.
    """
    groups: dict[Any, Group] = {}
    split, shown = prompts.prompt_parts, {row: images_key(examples[row]) for row in rows}
    times = Counter(shown.values())
    for row in rows:
        example = examples[row]
        parts = split(example) if split and example.media and times[shown[row]] > 1 else None
        if parts is None or not parts[1]:
            groups[row] = Group(rows=deque([row]))
            continue
        key = (shown[row], tuple(parts[0]), example.image_options)
        group = groups.setdefault(key, Group(rows=deque()))
        group.rows.append(row)
        group.tails[row] = parts[1]
    return list(groups.values())


def images_key(example: Example) -> tuple[Any, ...]:
    """Return a key of a row's images; pixels in memory have no hash, and are the same if they are one object."""
    sources = (getattr(medium, "source", medium) for medium in example.media)
    return tuple(source if getattr(source, "__hash__", None) else id(source) for source in sources)


class ContinuousBatch:
    """The rows that are in the model at the same time.

    Args:
        model: the model in eval mode, on its device.
        tokenizer: the tokenizer of the model.
        prompts: the inputs of rows.
        processors: the changes of the logits that the generation config asks for.
        batch_size: the largest number of rows at the same time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        processors: LogitsProcessorList,
        *,
        batch_size: int,
    ):
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.processors, self.batch_size = processors, batch_size
        ends = model.generation_config.eos_token_id
        self._end_ids = frozenset(ends if isinstance(ends, list) else [ends])
        self._pad_id = tokenizer.pad_token_id or 0

    def answers(
        self,
        groups: Sequence[Group],
        examples: Sequence[Example],
        limits: Mapping[int, int],
        on_answer: Callable[[int, Answer], object],
    ) -> None:
        """Answer all rows of some groups.

        Args:
            groups: the groups, in the order in which they enter the batch.
            examples: all rows.
            limits: the largest number of new tokens of each row.
            on_answer: the function that gets the number of a row and its answer, when it is at its end.
        """
        waiting = deque(groups)
        size = min(self.batch_size, sum(len(group.rows) for group in groups))
        slots = Slots(self.model, size, pad_id=self._pad_id)
        num_left = 0  # rows that left in the last step
        while waiting or slots.live:
            # A prefill of one row would read all weights for little, so some slots stay free until a quarter is; and
            # until half of them are, while many leave in each step.
            enough = size // 4 if num_left <= size // 8 else size // 2
            if waiting and slots.num_free >= max(1, enough):
                for new, rows in self.prefilled(next_rows(waiting, slots.num_free), examples, limits):
                    stay = self._take(new.logits, rows, on_answer)
                    if stay:
                        slots.put(new, stay, [rows[place] for place in stay])
                continue
            if not waiting and len(slots.live) <= len(slots.rows) // 2:
                slots.shrink()
            live = slots.live
            rows = [slots.rows[slot] for slot in live]
            stay = self._take(slots.step([row.ids[-1] for row in rows]), rows, on_answer)
            for place in set(range(len(live))) - set(stay):
                slots.rows[live[place]] = None
            num_left = len(live) - len(stay)

    def prompts_of(
        self, groups: Sequence[Group], examples: Sequence[Example]
    ) -> Iterator[tuple[CachedRows, list[InFlight]]]:
        """Yield all rows of some groups in batches, each row after its prompt went through the model.

        Args:
            groups: the groups, in the order in which their prompts are run.
            examples: all rows.
        """
        waiting = deque(groups)
        limits = dict.fromkeys((row for group in groups for row in group.rows), 0)
        while waiting:
            yield from self.prefilled(next_rows(waiting, self.batch_size), examples, limits)

    def prefilled(
        self, entering: list[tuple[Group, int]], examples: Sequence[Example], limits: Mapping[int, int]
    ) -> Iterator[tuple[CachedRows, list[InFlight]]]:
        """Yield rows whose prompts went through the model, in batches.

        Args:
            entering: the numbers of the rows, each with its group.
            examples: all rows.
            limits: the largest number of new tokens of each row.
        """
        leaders: list[tuple[Group, int]] = []
        followers: list[tuple[Group, int]] = []
        for group, row in entering:
            is_leader = group.prefix is None and all(group is not other for other, _ in leaders)
            (leaders if is_leader else followers).append((group, row))
        if leaders:
            cached, flying = self._whole([row for _, row in leaders], examples, limits)
            for place, (group, _) in enumerate(leaders):
                group.lead(cached, place, flying[place])
            yield cached, flying
        alone = [row for group, row in followers if group.prefix is None]
        if alone:
            yield self._whole(alone, examples, limits)
        rest = [(row, group.prefix, group.tail(row)) for group, row in followers if group.prefix is not None]
        if rest:
            yield self._rest(rest, limits)

    def _whole(
        self, rows: Sequence[int], examples: Sequence[Example], limits: Mapping[int, int]
    ) -> tuple[CachedRows, list[InFlight]]:
        """Run whole prompts through the model."""
        batch = self.prompts.prompt_batch([examples[row] for row in rows]).to(self.model.device, self.model.dtype)
        prompts = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
        ]
        flying = [InFlight(row=row, prompt=ids, limit=limits[row]) for row, ids in zip(rows, prompts, strict=True)]
        return CachedRows.prefill(self.model, batch), flying

    def _rest(
        self, entering: Sequence[tuple[int, Prefix, list[int]]], limits: Mapping[int, int]
    ) -> tuple[CachedRows, list[InFlight]]:
        """Run the rest of prompts through the model, whose beginning went through it with another row."""
        rows, prefixes, tails = zip(*entering, strict=True)
        flying = [
            InFlight(row=row, prompt=prefix.ids + tail, limit=limits[row])
            for row, prefix, tail in zip(rows, prefixes, tails, strict=True)
        ]
        return CachedRows.after(self.model, prefixes, tails, pad_id=self._pad_id), flying

    def _take(
        self, logits: Tensor, flying: Sequence[InFlight], on_answer: Callable[[int, Answer], object]
    ) -> list[int]:
        """Add the next token to each row, and return the places of the rows that are not at their end."""
        if self.processors:
            logits = self.processors(_padded_ids(flying, logits.device), logits)  # type: ignore[arg-type]
        stay = []
        for place, (row, token) in enumerate(zip(flying, logits.argmax(dim=-1).tolist(), strict=True)):
            row.ids.append(token)
            reason: FinishReason | None = None
            if token in self._end_ids:
                reason = "stop"
            elif len(row.ids) >= row.limit:
                reason = "length"
            if reason is None:
                stay.append(place)
                continue
            text = str(self.tokenizer.decode(row.ids, skip_special_tokens=True)).strip()
            on_answer(
                row.row,
                Answer(text=text, finish_reason=reason, prompt_tokens=len(row.prompt), completion_tokens=len(row.ids)),
            )
        return stay


def next_rows(waiting: deque[Group], count: int) -> list[tuple[Group, int]]:
    """Take up to ``count`` rows out of the groups that wait, each with its group."""
    taken: list[tuple[Group, int]] = []
    while waiting and len(taken) < count:
        group = waiting[0]
        taken.append((group, group.rows.popleft()))
        if not group.rows:
            waiting.popleft()
    return taken


def _padded_ids(flying: Sequence[InFlight], device: torch.device) -> Tensor:
    """Return prompts and answers, [B, L]; a row's own first id fills it up, so that no other id counts as seen."""
    found = [row.prompt + row.ids for row in flying]
    size = max(map(len, found))
    return torch.tensor([[ids[0]] * (size - len(ids)) + ids for ids in found], device=device)

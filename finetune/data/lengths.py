"""The number of tokens of each row, counted before the first step without opening images: no row is ever cut."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from finetune.core.batch import Rendered
from finetune.core.cache import Notes
from finetune.core.example import ask
from finetune.data.aspect_ratio import refuse_aspect
from finetune.data.image_checks import image_sizes
from finetune.data.media import refuse_unopened
from finetune.errors import DataError, FinetuneError, RowError
from finetune.interfaces import RowTokens, TaskCollator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.core.example import Example, Message
    from finetune.data.bad_rows import BadRows
    from finetune.data.image_checks import Size
    from finetune.data.spans import Tokenized
    from finetune.interfaces import PaddingSide, RowLengths
    from finetune.recipe import RowsSection

_LISTED = 20  # rows named in a report


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the number of tokens that the language model takes; None if its config sets no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def refused_by_processor(where: str, processor: ProcessorMixin, error: Exception) -> RowError:
    """Return the error of a row that a processor cannot encode."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    fault = f"{where}: {type(processor).__name__} cannot encode these texts and images. Change them: {lines[0]}"
    return RowError(fault, reason="refused by the processor")


class RowTokenizer(TaskCollator, Protocol):
    """A collator that makes text and tokens of single rows."""

    def supervise(self, example: Example) -> Tokenized:
        """Return the rendered row and which of its tokens are supervised."""

    def prompt(self, example: Example) -> Tokenized:
        """Return the rendered row up to where its last turn begins."""

    def render(self, messages: list[Message], *, for_answer: bool = False) -> str:
        """Return the conversation as text; ``for_answer`` opens the assistant's turn."""

    def encode(self, rows: Sequence[Rendered], padding_side: PaddingSide) -> dict[str, Any]:
        """Return the model's inputs of rendered rows."""


class Lengths:
    """A counter of the tokens of rows for one base.

    The number of tokens of images depends only on their sizes. So the processor encodes blank images once for each
    list of sizes, and the number is kept. If a processor puts line breaks around an image that merge with the text
    beside it, a row may be a token or two shorter than its count.

    Args:
        collator: the collator of the base.
        key: a text that changes with the processor.
    """

    def __init__(self, collator: RowTokenizer, *, key: str):
        self.collator, self.key = collator, f"{version('transformers')} {key}"
        self.notes = Notes("image_tokens.sqlite")
        self.tokens: dict[tuple[Size, ...], int] = {(): 0}

    def of_training_row(self, example: Example, sizes: Sequence[Size]) -> RowTokens:
        """Return the tokens of a row with its longest caption; also refuse a row that cannot be supervised."""
        variants = [example.with_text(caption) for caption in example.captions] or [example]
        rendered = [self.collator.supervise(variant) for variant in variants]
        longest = max(len(each.ids) for each in rendered)
        answer = max((stop - start for each in rendered for start, stop in each.supervised), default=0)
        return RowTokens(longest - len(sizes) + self._of_row(example, sizes), answer)

    def of_prompt(self, example: Example, sizes: Sequence[Size]) -> RowTokens:
        """Return the tokens of a row up to the beginning of its answer, and those of its longest reference."""
        prompt = len(self.collator.prompt(example).ids)
        tokenizer = self.collator.processor.tokenizer
        references = tokenizer(example.answers, add_special_tokens=False)["input_ids"] if example.answers else []
        answer = max((len(ids) for ids in references), default=0) + 1
        return RowTokens(prompt - len(sizes) + self._of_row(example, sizes), answer)

    def _of_row(self, example: Example, sizes: Sequence[Size]) -> int:
        try:
            return self.of_images(tuple(sizes))
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:  # errors of processors
            if isinstance(error, FinetuneError):
                raise
            shown = ", ".join(f"{width} x {height}" for width, height in sizes)
            where = f"row {example.id}, images of {shown}"
            raise refused_by_processor(where, self.collator.processor, error) from None

    def of_images(self, sizes: tuple[Size, ...]) -> int:
        """Return the number of tokens of images of these sizes in one row."""
        if sizes not in self.tokens:
            note = json.dumps([self.key, sizes])
            known = self.notes.get([note]).get(note, "")
            self.tokens[sizes] = int(known) if known.isdecimal() else self._measured(sizes)
            if not known.isdecimal():
                self.notes.put({note: str(self.tokens[sizes])})
        return self.tokens[sizes]

    def _measured(self, sizes: tuple[Size, ...]) -> int:
        text = self.collator.render(ask("?", num_images=len(sizes)), for_answer=True)
        plain = len(self.collator.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        blank = tuple(Image.new("RGB", size) for size in sizes)
        inputs = self.collator.encode([Rendered(text, blank)], "right")
        return int(inputs["attention_mask"].sum()) - plain + len(sizes)


def fitting(
    examples: list[Example],
    lengths: RowLengths,
    section: RowsSection,
    split: str,
    *,
    limit: int | None,
    room: int,
    bad: BadRows,
) -> list[Example]:
    """Return the rows that the base takes, with their lengths; refuse rows that would stop the first step.

    Args:
        examples: the rows, whose images can be read.
        lengths: the counter of the base.
        section: the section whose ``too_long`` decides what happens to rows that are too long.
        split: the split; ``train`` rows are counted with their answers, others up to their answers.
        limit: the largest number of tokens of a row; None for no bound.
        room: the number of tokens that are left free for the answer.
        bad: the record of the rows that this base cannot take.

    Raises:
        DataError: if rows are too long, or a row cannot be used with this base; the message names the rows.
    """
    cap = lengths.collator.max_image_pixels
    page = examples[0].image_options.page if examples else None
    sources = [source for example in examples for source in example.images]
    found = iter(image_sizes(sources, max_pixels=cap, page=page))
    count = lengths.of_training_row if split == "train" else lengths.of_prompt
    fit: list[Example] = []
    long: list[tuple[Example, int]] = []
    for example in examples:
        sizes = [next(found) for _ in example.images]
        try:
            usable = _sizes(sizes)
            for size in usable:
                refuse_aspect(size, f"row {example.id}: its image", lengths.collator.max_aspect)
            counted = count(example, usable)
            refuse_unopened(example)
        except RowError as error:
            bad.note(error)
        else:
            tokens = counted.row + room
            if limit is None or tokens <= limit:
                fit.append(replace(example, num_tokens=tokens, num_answer_tokens=counted.answer))
            else:
                long.append((example, tokens))
    if long:
        report = _report(long, len(examples), split, limit)
        if section.too_long == "error":
            raise DataError(
                f"{report}\nA row is never cut. Shorten these rows, make their images smaller, raise data.max_length "
                "where the base takes more, or leave them out with data.too_long=drop."
            )
        if not fit:
            raise DataError(f"{report}\nNo row is left. Shorten the rows, or raise data.max_length.")
        bad.log(f"{report}\nThey are left out (data.too_long: drop).")
    return fit


def _sizes(found: list[Size | RowError]) -> list[Size]:
    for size in found:
        if isinstance(size, RowError):
            raise size
    return found  # type: ignore[return-value]


def _report(long: list[tuple[Example, int]], rows: int, split: str, limit: int | None) -> str:
    worst = sorted(long, key=lambda item: -item[1])
    named = ", ".join(f"{example.id} ({tokens})" for example, tokens in worst[:_LISTED])
    more = f" and {len(worst) - _LISTED} more" if len(worst) > _LISTED else ""
    return f"{len(long)} of {rows} {split} rows are longer than {limit} tokens: {named}{more}."

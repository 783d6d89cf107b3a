"""A collator of pairs of an image and a text, for a base that compares images with texts."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch

from finetune.core.batch import Batch, Rendered
from finetune.core.example import text_of, texts_to_choose_from
from finetune.data.aspect_ratio import most_aspect
from finetune.data.lengths import max_positions
from finetune.data.marks import Marks
from finetune.data.media import image_name, open_images, refuse_media
from finetune.errors import DataError, RowError
from finetune.interfaces import RowTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.core.example import Example, Message
    from finetune.data.image_checks import Size
    from finetune.interfaces import ModelFamily
    from finetune.recipe import ReadSection


class PairCollator:
    """A collator that makes the batches of one dual encoder: an image, and the text of the row's last turn.

    Args:
        family: the family of the model, which encodes its inputs.
        processor: the processor of the model.
        max_length: the largest number of tokens of a text, with its first and last special token; None for no bound.
        max_image_pixels: the largest width x height of an image, in pixels.
    """

    def __init__(
        self,
        family: ModelFamily,
        processor: ProcessorMixin,
        *,
        max_length: int | None,
        max_image_pixels: int = 50_000_000,
    ):
        self.family, self.processor = family, processor
        self.max_length, self.max_image_pixels = max_length, max_image_pixels

    @classmethod
    def of_base(
        cls, family: ModelFamily, model: PreTrainedModel, processor: ProcessorMixin, data: ReadSection | None
    ) -> Self:
        """Return the collator of a dual encoder; arguments as for ``Collator.of_base``."""
        options = data.model_dump(include={"max_image_pixels"}) if data else {}  # all of its text counts
        return cls(family, processor, max_length=max_positions(model), **options)

    def copy(self) -> PairCollator:
        """Return a collator with its own processor, because a processor serves one thread at a time."""
        other = copy.copy(self)
        other.processor = copy.deepcopy(self.processor)
        other.__dict__.pop("marks", None)  # they belong to the first processor
        return other

    def lengths(self, *, key: str) -> PairLengths:
        """Return the counter of the texts' tokens."""
        return PairLengths(self)

    @cached_property
    def max_aspect(self) -> int:
        """Return the largest ratio of an image's longer side to its shorter side."""
        return most_aspect(self.processor)

    @cached_property
    def marks(self) -> Marks:
        """Return the check for marks that no text may hold."""
        return Marks(self.processor)

    def render(self, messages: list[Message]) -> str:
        """Return the text of the last turn, which is paired with the image."""
        return text_of(messages[-1])

    def training_batch(self, rows: Sequence[Example | tuple[Example, bool]]) -> Batch:
        """Return pairs with labels; a row paired with False only fills up a batch and is not supervised."""
        pairs = [row if isinstance(row, tuple) else (row, True) for row in rows]
        examples = [example for example, _ in pairs]
        texts = [self.render(example.messages) for example in examples]
        labels = [0 if supervised else -100 for _, supervised in pairs]
        self._check_texts(texts, examples)
        rendered = [Rendered(text, self._open(example)) for text, example in zip(texts, examples, strict=True)]
        return Batch(self._encode(rendered), examples, torch.tensor(labels))

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Return the images of the rows, and all texts that an answer may be chosen from, if there are any."""
        texts = texts_to_choose_from(examples)
        self._check_texts(texts, examples)
        shown = [Rendered(None, self._open(example)) for example in examples]
        return Batch(self._encode([*shown, *map(Rendered, texts)]), list(examples))

    def text_batch(self, texts: Sequence[str]) -> Batch:
        """Return texts alone."""
        self._check_texts(texts, [])
        return Batch(self._encode([Rendered(text) for text in texts]), [])

    def show(self, example: Example) -> str:
        """Return a row as text: its image, and the text of the pair between ⟦ and ⟧."""
        return f"<{image_name(example.images[0])}> ⟦{self.render(example.messages)}⟧"

    def _check_texts(self, texts: Sequence[str], examples: Sequence[Example]) -> None:
        for text in texts:
            self.marks.refuse_text(text, where=f"{self._where(text, examples) or 'text: '}{text!r:.80}")
        for text, ids in zip(texts, self.processor.tokenizer(list(texts))["input_ids"] if texts else [], strict=True):
            if self.max_length and len(ids) > self.max_length:
                raise DataError(
                    f"{self._where(text, examples)}a text must have at most {self.max_length} tokens for this base, "
                    f"got {len(ids)} in {text!r:.80}. A text is never cut: shorten it, or task.text_template."
                )

    def _open(self, example: Example) -> tuple[Image, ...]:
        _require_one_image(example, self.family)
        return tuple(open_images(example, max_pixels=self.max_image_pixels, max_aspect=self.max_aspect))

    def _encode(self, rows: list[Rendered]) -> dict[str, Any]:
        return self.family.encode(self.processor, rows, padding_side="right")

    def _where(self, text: str, examples: Sequence[Example]) -> str:
        own = (e.id for e in examples if text == self.render(e.messages) or text in e.choices.values())
        return next((f"row {row}: " for row in own), "")


class PairLengths:
    """A counter of the tokens of texts for one dual encoder; an image has none.

    Args:
        collator: the collator of the base.
    """

    def __init__(self, collator: PairCollator):
        self.collator = collator

    def of_training_row(self, example: Example, sizes: Sequence[Size]) -> RowTokens:
        """Return the tokens of a row's longest text; also refuse a row that is not a pair."""
        _require_one_image(example, self.collator.family)
        return self._longest([text_of(example.messages[-1]), *example.captions], example)

    def of_prompt(self, example: Example, sizes: Sequence[Size]) -> RowTokens:
        """Return the tokens of a row's longest correct text; also refuse a row that is not a pair."""
        _require_one_image(example, self.collator.family)
        return self._longest([example.choices[label] for label in example.answers], example)

    def _longest(self, texts: list[str], example: Example) -> RowTokens:
        for text in texts:
            self.collator.marks.refuse_text(text, where=f"row {example.id}: {text!r:.80}")
        longest = max(len(ids) for ids in self.collator.processor.tokenizer(texts)["input_ids"])
        return RowTokens(longest, longest)


def _require_one_image(example: Example, family: ModelFamily) -> None:
    refuse_media(example, family)
    if len(example.images) != 1:
        raise RowError(
            f"row {example.id}: a row must have exactly one image beside its text, got {len(example.images)} images. "
            "Leave the row out, or make one row for each image.",
            reason="not one image",
        )

"""From examples to a batch: rendered by the chat template, encoded by the family, only the answer supervised."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from finetune.data.images import open_image
from finetune.errors import DataError
from finetune.interfaces import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import ProcessorMixin

    from finetune.example import Example, Message
    from finetune.interfaces import GenerativeFamily


@dataclass(frozen=True)
class Supervised:
    """A rendered conversation, and which of its last tokens are learnt.

    ``tail`` holds the ids from the first learnt token to the end, ``length`` says how many of them are learnt: counted
    from the end they are right whatever number of tokens the pictures become.
    """

    text: str
    tail: list[int]
    length: int


class Collator:
    """Makes batches for one model.

    Args:
        family: how this model's inputs are made.
        processor: the model's own.
        end_ids: token ids that end a turn, as generation knows them.
        max_image_pixels: cap on width x height of a picture.
    """

    def __init__(
        self,
        family: GenerativeFamily,
        processor: ProcessorMixin,
        end_ids: Sequence[int],
        *,
        max_image_pixels: int = 50_000_000,
    ):
        self.family, self.processor = family, processor
        self.end_ids = frozenset(end_ids)
        self.max_image_pixels = max_image_pixels

    def render(self, messages: list[Message], *, for_answer: bool = False) -> str:
        """Returns the conversation as text; ``for_answer`` opens the assistant's turn."""
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_answer)

    def training_batch(self, rows: Sequence[Example | tuple[Example, bool]]) -> Batch:
        """Returns right-padded rows with labels; a row paired with False fills up a batch and is not learnt."""
        examples = [row[0] if isinstance(row, tuple) else row for row in rows]
        counted = [row[1] if isinstance(row, tuple) else True for row in rows]
        supervised = [self.supervise(example) for example in examples]
        inputs = self._encode([s.text for s in supervised], examples, "right")
        input_ids = inputs["input_ids"]
        labels = torch.full_like(input_ids, -100)
        ends = inputs["attention_mask"].sum(dim=1).tolist()
        for i, (row, end) in enumerate(zip(supervised, ends, strict=True)):
            start = end - len(row.tail)
            if input_ids[i, start:end].tolist() != row.tail:
                raise DataError(f"row {examples[i].id}: the processor does not encode the answer as the tokenizer does")
            if counted[i]:
                labels[i, start : start + row.length] = input_ids[i, start : start + row.length]
        return Batch(self.family.mark_learnt(inputs, labels), examples, labels)

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Returns left-padded rows that end where the answer begins."""
        texts = [self.render(example.prompt, for_answer=True) for example in examples]
        return Batch(self._encode(texts, examples, "left"), list(examples))

    def supervise(self, example: Example) -> Supervised:
        """Finds the tokens of the answer, its end-of-turn token included, by their offsets in the rendered text.

        Raises:
            DataError: the chat template does not allow it.
        """
        full = self.render(example.messages)
        prompt = self.render(example.prompt, for_answer=True)
        if not full.startswith(prompt):
            raise DataError(
                f"row {example.id}: the chat template renders the prompt differently when the answer follows"
            )
        encoded = self.processor.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        first = next((i for i, (start, _) in enumerate(offsets) if start >= len(prompt)), len(ids))
        if first == 0 or offsets[first - 1][1] > len(prompt):
            raise DataError(f"row {example.id}: the answer does not begin at a token of its own")
        stop = next((i + 1 for i in range(first, len(ids)) if ids[i] in self.end_ids), None)
        if stop is None:
            raise DataError(
                f"row {example.id}: the chat template ends the answer with no token that ends generation "
                f"({sorted(self.end_ids)})"
            )
        return Supervised(full, ids[first:], stop - first)

    def show(self, example: Example) -> str:
        """Returns the decoded row with its supervised part between ⟦ and ⟧, runs of image tokens shortened."""
        batch = self.training_batch([example])
        assert batch.labels is not None
        ids, labels = batch.inputs["input_ids"][0].tolist(), batch.labels[0].tolist()
        learnt = [i for i, label in enumerate(labels) if label != -100]
        decode = self.processor.tokenizer.decode
        before, said = ids[: learnt[0]], ids[learnt[0] : learnt[-1] + 1]
        text = f"{_shorten(decode, before)}⟦{decode(said)}⟧{decode(ids[learnt[-1] + 1 :])}"
        return text.replace("\n", "⏎")

    def _encode(self, texts: list[str], examples: Sequence[Example], padding_side: Any) -> dict[str, Any]:
        images = [
            [
                open_image(source, max_pixels=self.max_image_pixels, name=f"row {example.id}: {_name(source)}")
                for source in example.images
            ]
            for example in examples
        ]
        return self.family.encode(self.processor, texts, images, padding_side=padding_side)


def _name(source: Any) -> str:
    return str(source) if hasattr(source, "parts") else "its picture"


def _shorten(decode: Any, ids: list[int]) -> str:
    """Decodes ids, writing a run of more than three equal tokens as ``token×n``."""
    out: list[str] = []
    plain: list[int] = []
    for token, run in groupby(ids):
        length = len(list(run))
        if length > 3:
            out += [decode(plain), f"{decode([token])}×{length}"]
            plain = []
        else:
            plain += [token] * length
    return "".join([*out, decode(plain)])

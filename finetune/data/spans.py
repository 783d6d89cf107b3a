"""The supervised tokens of a conversation: located in the rendered text, then among the tokens of the processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from finetune.errors import DataError, RowError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from transformers import PreTrainedTokenizerBase

    from finetune.core.example import Example, Message

Span = tuple[int, int]  # first token, and the one after the last


@dataclass(frozen=True)
class Tokenized:
    """A conversation as text, its tokens with one placeholder for each image, and the spans that are supervised."""

    text: str
    ids: list[int]
    supervised: list[Span]


class SpanFinder:
    """A finder of the assistant's turns of a conversation, each with the token that ends it.

    Args:
        render: the function that renders messages; ``for_answer`` opens the assistant's turn.
        tokenizer: the tokenizer of the processor.
        image_id: the token id of the placeholder for an image in rendered text.
        end_ids: the token ids that end a turn, the same as in generation.
    """

    def __init__(
        self,
        render: Callable[..., str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_id: int,
        end_ids: Collection[int],
    ):
        self._render, self.tokenizer, self.image_id, self.end_ids = render, tokenizer, image_id, end_ids

    def find(self, example: Example, *, supervise: Literal["all", "last"]) -> Tokenized:
        """Return the rendered conversation with the tokens that are supervised.

        Raises:
            DataError: if the supervised tokens cannot be located with this chat template and tokenizer.
        """
        row, messages = f"row {example.id}", example.messages
        text = self._ended(messages, row)
        ids, offsets = self._encode(text, row)
        require_placeholders(ids, self.image_id, len(example.images), row=row)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        allowed = [turn for number, turn in enumerate(turns) if number not in example.unsupervised]
        turns = allowed if supervise == "all" else [turn for turn in turns[-1:] if turn in allowed]
        supervised = [self._turn(messages, turn, text, ids, offsets, row) for turn in turns]
        return Tokenized(text, ids, supervised)

    def render(self, messages: list[Message], row: str, *, for_answer: bool = False) -> str:
        """Return the text of ``messages``.

        Raises:
            RowError: if the chat template refuses them; the message names the row.
        """
        try:
            return self._render(messages, for_answer=for_answer)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise RowError(
                f"{row}: the chat template cannot render the conversation: {str(error).rstrip('.')}. Change the "
                "messages, or leave the row out.",
                reason="refused by the chat template",
            ) from None

    def _ended(self, messages: list[Message], row: str) -> str:
        """Return the rendered conversation with its last turn ended: LLaVA's template does not end it."""
        text, prompt = self.render(messages, row), self.render(messages[:-1], row, for_answer=True)
        ends = [end for end in self.tokenizer.convert_ids_to_tokens(sorted(self.end_ids)) if end]
        if not ends or not text.startswith(prompt) or any(end in text[len(prompt) :] for end in ends):
            return text
        eos = self.tokenizer.eos_token
        return text.rstrip() + str(eos if eos in ends else ends[0])

    def _turn(
        self, messages: list[Message], turn: int, text: str, ids: list[int], offsets: list[Span], row: str
    ) -> Span:
        """Return the tokens of one assistant turn, from the first generated token to the one that ends the turn."""
        number = f"turn {turn + 1}"
        prompt = self.render(messages[:turn], row, for_answer=True)
        upto = text if turn + 1 == len(messages) else self.render(messages[: turn + 1], row)
        if not (text.startswith(prompt) and text.startswith(upto) and len(prompt) < len(upto)):
            raise DataError(
                f"{row}: the chat template must render the text before {number} the same with and without later turns, "
                "but it does not. The model would train on prompts that it never gets in use. Set data.supervise=last, "
                "or use a template that keeps earlier turns unchanged."
            )
        first, after = _first_from(offsets, len(prompt)), _first_from(offsets, len(upto))
        if self._encode(prompt, row)[0] != ids[:first]:
            raise RowError(
                f"{row}: {number} must begin with a token of its own, but its first token also holds the end of the "
                "prompt. Remove a space or line break at the beginning of its text.",
                reason="text that merges with its prompt",
            )
        stop = next((i + 1 for i in range(first, after) if ids[i] in self.end_ids), None)
        if stop is None:
            raise DataError(
                f"{row}: the chat template must end {number} with a token that ends generation "
                f"({sorted(self.end_ids)}), but it does not. If only the last turn ends with one, set "
                "data.supervise=last."
            )
        return first, stop

    def _encode(self, text: str, row: str) -> tuple[list[int], list[Span]]:
        if not self.tokenizer.is_fast:
            raise DataError(
                f"{row}: the tokenizer must return offsets, which locate the answer in the text, but "
                f"{type(self.tokenizer).__name__} returns none. Use a base with a fast tokenizer (tokenizer.json)."
            )
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        starts = [start for start, _ in offsets]
        if starts != sorted(starts) or (offsets and offsets[-1][1] < len(text.rstrip())):
            raise DataError(
                f"{row}: the offsets of the tokenizer must fit the text, but the tokenizer changes the text too much. "
                "Use a base with another tokenizer."
            )
        return ids, offsets


def require_placeholders(ids: Sequence[int], image_id: int, num_images: int, *, row: str) -> None:
    """Raise DataError unless the text has one placeholder for each image."""
    places = sum(token == image_id for token in ids)
    if places != num_images:
        raise DataError(
            f"{row}: the rendered text must have one placeholder for each image, got {places} placeholders for "
            f"{num_images} images. Use a base whose chat template renders each image part once."
        )


def place_spans(rendered: Tokenized, encoded: Sequence[int], *, image_id: int, row: str) -> list[Span]:
    """Find the supervised tokens among those that the processor made, which has many tokens for each image.

    Two searches look for the whole text between two images: one from the front finds its earliest place, one from the
    back its latest. If both agree, the place is unique. Tokens beside an image are not compared, because a processor
    may put line breaks there that merge with them.

    Args:
        rendered: the rendered conversation, with one placeholder for each image.
        encoded: the input_ids of the row from the processor, without padding.
        image_id: the token id of the placeholder; the processor keeps at least one for each image.
        row: the name of the row in errors.

    Raises:
        DataError: if the tokens of the processor are not those of the text.
    """
    segments = _segments(rendered.ids, image_id)
    texts = [rendered.ids[start:stop] for start, stop in segments]
    early = _earliest(texts, list(encoded), image_id)
    backwards = _earliest([text[::-1] for text in texts[::-1]], list(encoded)[::-1], image_id)
    if early is None or backwards is None:
        raise DataError(
            f"{row}: the processor must encode the text as its tokenizer does, but their tokens differ. Use a base "
            "whose processor does not change the text."
        )
    late = [len(encoded) - place - len(text) for place, text in zip(backwards[::-1], texts, strict=True)]
    spans = []
    for first, stop in rendered.supervised:
        inside = [i for i, (start, end) in enumerate(segments) if start <= first and stop <= end]
        if not inside or early[inside[0]] != late[inside[0]]:
            raise DataError(
                f"{row}: the text of the assistant must fit exactly one place among the tokens of the processor, but "
                "no single place fits. Leave the row out, or change its texts."
            )
        shift = early[inside[0]] - segments[inside[0]][0]
        spans.append((first + shift, stop + shift))
    return spans


def _segments(ids: Sequence[int], image_id: int) -> list[Span]:
    """Return the stretches of text between images, without the tokens that touch one."""
    borders = [-1, *(i for i, token in enumerate(ids) if token == image_id), len(ids)]
    stretches = []
    for before, after in zip(borders, borders[1:], strict=False):
        start = before + 1 + (before >= 0)
        stop = after - (after < len(ids))
        if start < stop:
            stretches.append((start, stop))
    return stretches


def _earliest(texts: list[list[int]], encoded: list[int], image_id: int) -> list[int] | None:
    """Return the earliest place of each text after the previous text and an image; None if a text is not found."""
    places: list[int] = []
    at = 0
    for text in texts:
        if places:
            at = next((i + 1 for i in range(at, len(encoded)) if encoded[i] == image_id), len(encoded))
        stop = len(encoded) - len(text) + 1
        found = next((i for i in range(at, stop) if encoded[i] == text[0] and encoded[i : i + len(text)] == text), None)
        if found is None:
            return None
        places.append(found)
        at = found + len(text)
    return places


def _first_from(offsets: list[Span], position: int) -> int:
    """Return the first token that begins at or after a position of the text."""
    return next((i for i, (start, _) in enumerate(offsets) if start >= position), len(offsets))

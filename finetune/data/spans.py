"""The supervised tokens of a conversation: found in the rendered text, then in the tokens of the processor."""

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
    """A conversation as text, its tokens with one placeholder an image, and which of them are supervised."""

    text: str
    ids: list[int]
    supervised: list[Span]


class SpanFinder:
    """A finder of the assistant's turns of a conversation, each with the token that ends it.

    Args:
        render: the function that renders messages; ``for_answer`` opens the assistant's turn.
        tokenizer: the processor's own.
        image_id: the placeholder that stands for an image in rendered text.
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
            DataError: the chat template or the tokenizer does not allow it.
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
        """Return the text of ``messages``; if the template refuses them, the error names the row."""
        try:
            return self._render(messages, for_answer=for_answer)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise RowError(
                f"{row}: the chat template cannot render the conversation: {error}", reason="not for this template"
            ) from None

    def _ended(self, messages: list[Message], row: str) -> str:
        """Return the rendered conversation, its last turn ended: LLaVA's template leaves that to its trainer."""
        text, prompt = self.render(messages, row), self.render(messages[:-1], row, for_answer=True)
        ends = [end for end in self.tokenizer.convert_ids_to_tokens(sorted(self.end_ids)) if end]
        if not ends or not text.startswith(prompt) or any(end in text[len(prompt) :] for end in ends):
            return text
        eos = self.tokenizer.eos_token
        return text.rstrip() + str(eos if eos in ends else ends[0])

    def _turn(
        self, messages: list[Message], turn: int, text: str, ids: list[int], offsets: list[Span], row: str
    ) -> Span:
        """Return the tokens of one assistant turn, from the first that generation would make to the end of turn."""
        number = f"turn {turn + 1}"
        prompt = self.render(messages[:turn], row, for_answer=True)
        upto = text if turn + 1 == len(messages) else self.render(messages[: turn + 1], row)
        if not (text.startswith(prompt) and text.startswith(upto) and len(prompt) < len(upto)):
            raise DataError(
                f"{row}: the chat template renders what stands before {number} differently when more follows, so the "
                "model would learn to answer prompts it is never given. Set data.supervise=last, or use a template "
                "that leaves earlier turns as they are."
            )
        first, after = _first_from(offsets, len(prompt)), _first_from(offsets, len(upto))
        if self._encode(prompt, row)[0] != ids[:first]:
            raise RowError(
                f"{row}: {number} does not begin at a token of its own. A text that begins with a space or a line "
                "break does that; take it away.",
                reason="text that merges with its prompt",
            )
        stop = next((i + 1 for i in range(first, after) if ids[i] in self.end_ids), None)
        if stop is None:
            raise DataError(
                f"{row}: the chat template ends {number} with no token that ends generation ({sorted(self.end_ids)}). "
                "Where it ends the last turn only, set data.supervise=last."
            )
        return first, stop

    def _encode(self, text: str, row: str) -> tuple[list[int], list[Span]]:
        if not self.tokenizer.is_fast:
            raise DataError(
                f"{row}: the tokenizer ({type(self.tokenizer).__name__}) tells no offsets, so the answer cannot be "
                "found in the text. Use a base with a fast tokenizer (tokenizer.json)."
            )
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        starts = [start for start, _ in offsets]
        if starts != sorted(starts) or (offsets and offsets[-1][1] < len(text.rstrip())):
            raise DataError(f"{row}: the tokenizer changes the text so far that its offsets do not fit it")
        return ids, offsets


def require_placeholders(ids: Sequence[int], image_id: int, num_images: int, *, row: str) -> None:
    """Raise DataError unless the text has one placeholder an image."""
    places = sum(token == image_id for token in ids)
    if places != num_images:
        raise DataError(f"{row}: the rendered text has {places} places for {num_images} images")


def place_spans(rendered: Tokenized, encoded: Sequence[int], *, image_id: int, row: str) -> list[Span]:
    """Find the supervised tokens among those that the processor made, where each image has become many tokens.

    The text between two images is looked for as a whole, once from the front as early as it can be and once from
    the back as late as it can be: where both agree there is no other place. Tokens beside an image are left out of
    the comparison, since a processor may put line breaks there that merge with them.

    Args:
        rendered: the rendered conversation, with one placeholder for each image.
        encoded: the encoded row, with one row of input_ids without padding.
        image_id: the id of the placeholder; the processor leaves at least one for each image.
        row: the name of the row in errors.

    Raises:
        DataError: the processor's tokens are not those of the text.
    """
    segments = _segments(rendered.ids, image_id)
    texts = [rendered.ids[start:stop] for start, stop in segments]
    early = _earliest(texts, list(encoded), image_id)
    backwards = _earliest([text[::-1] for text in texts[::-1]], list(encoded)[::-1], image_id)
    if early is None or backwards is None:
        raise DataError(f"{row}: the processor does not encode the text as the tokenizer does")
    late = [len(encoded) - place - len(text) for place, text in zip(backwards[::-1], texts, strict=True)]
    spans = []
    for first, stop in rendered.supervised:
        inside = [i for i, (start, end) in enumerate(segments) if start <= first and stop <= end]
        if not inside or early[inside[0]] != late[inside[0]]:
            raise DataError(f"{row}: it cannot be told which of the processor's tokens are the assistant's")
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
    """Return the first place of each text behind the one before and an image; None where one is nowhere."""
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
    """Return the first token that begins at a position of the text or behind it."""
    return next((i for i, (start, _) in enumerate(offsets) if start >= position), len(offsets))

"""Special marks in texts from outside: only the chat template and the processor may write them.

A special token in a text becomes that token: it would open or end a turn, or stand for an image. So every text is
checked, in rows of all splits and in the requests of apps, and a text with such a token is refused. The same holds for
the best-known marks of other models, which this base reads as plain text: a row with ``<image>`` was written for a
trainer that puts the image there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from finetune.errors import RowError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from finetune.core.example import Example, Message

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_IMAGES = (
    "<image>", "<|image|>", "<|image_pad|>", "<|vision_start|>", "<|image_start|>", "<|begin_of_image|>",
    "<|media_pad|>", "<image_soft_token>", "<start_of_image>", "<boi>", "<IMG_CONTEXT>", "<image_placeholder>",
    "<ImageHere>", "<im_patch>", "<fake_token_around_image>", *(f"<|image_{n}|>" for n in range(1, 10)),
)  # fmt: skip
_OTHER_MEDIA = ("<video>", "<|video|>", "<|video_pad|>", "<|audio|>", "<|audio_pad|>")
_TURNS = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|eot_id|>")


class Marks:
    """A check that refuses texts with marks.

    Args:
        processor: the processor of the base.
        ids: the token ids of further marks: the tokens that end a turn, and the one that stands for an image.
        render: the function that applies the chat template, as ``Collator.render``; None if the base has no template.
    """

    def __init__(
        self, processor: ProcessorMixin, *, ids: Collection[int] = (), render: Callable[..., str] | None = None
    ):
        tokenizer = processor.tokenizer
        found = _special_tokens(processor, ids) | _turn_marks(tokenizer, render)
        self._own = _any_of(found)
        self._others = _any_of({*_IMAGES, *_OTHER_MEDIA, *_TURNS} - found)
        # The tokenizer may search for a token in the normalised text, where the token may be written differently.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        normalized = any(token.normalized and token.content in found for token in _added(tokenizer))
        self._normalizer = backend.normalizer if backend is not None and normalized else None

    def refuse(self, example: Example) -> None:
        """Raise RowError if a message of the row holds a mark."""
        for number, message in enumerate(example.messages, start=1):
            where = f"row {example.id}, message {number} ({message['role']})"
            for text in _texts(message):
                self.refuse_text(text, where=where)

    def refuse_text(self, text: str, *, where: str) -> None:
        """Raise RowError if ``text`` holds a mark; ``where`` is the name of the text in the error."""
        if _SURROGATE.search(text):
            raise RowError(
                f"{where}: the text holds half of a character (a lone surrogate). Write the whole character.",
                reason="not Unicode",
            )
        own = self._own.search(text) or (
            self._normalizer is not None and self._own.search(self._normalizer.normalize_str(text))
        )
        if own:
            raise RowError(
                f"{where}: the text holds {own[0]!r}, a special token of this base. The base would read it as that "
                f"token and not as text. {_way_out(own[0])}",
                reason="text with a special token",
            )
        other = self._others.search(text)
        if other:
            raise RowError(
                f"{where}: the text holds {other[0]!r}, a mark of other models that this base reads as plain text. "
                f"{_way_out(other[0])}",
                reason="text with a mark of another model",
            )


def _special_tokens(processor: Any, ids: Collection[int]) -> set[str]:
    """Return the special tokens of a tokenizer, and the added tokens that are attributes of its processor."""
    tokenizer = processor.tokenizer
    added = _added(tokenizer)
    known = {token.content for token in added}
    found = {str(token) for token in tokenizer.all_special_tokens} | {token.content for token in added if token.special}
    found |= {str(value) for value in vars(processor).values() if not callable(value) and str(value) in known}
    found |= {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids)) if token}
    return {token for token in found if token.strip()}


def _turn_marks(tokenizer: PreTrainedTokenizerBase, render: Callable[..., str] | None) -> set[str]:
    """Return the added tokens that the chat template writes between turns; they need not be special."""
    if render is None:
        return set()
    turns = [{"role": role, "content": [{"type": "text", "text": "?"}]} for role in ("user", "assistant", "user")]
    try:
        text = render(turns, for_answer=True)
    except (TemplateError, TypeError, KeyError, ValueError):  # the template takes only other conversations
        return set()
    return {token.content for token in _added(tokenizer) if token.content.strip() and token.content in text}


def _added(tokenizer: Any) -> Iterable[Any]:
    return getattr(tokenizer, "added_tokens_decoder", {}).values()


def _texts(message: Message) -> list[str]:
    """Return the texts of a message; texts with no image between them are one, because the template joins them."""
    texts = [""]
    for part in message["content"]:
        if part["type"] == "text":
            texts[-1] += part["text"]
        else:
            texts.append("")
    return texts


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of ``tokens``; it never matches if there are none."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _way_out(token: str) -> str:
    if token in _OTHER_MEDIA:
        return "Only images are read. Remove it from the text."
    if token in _IMAGES:
        return (
            "Remove it from the text. The images of a question come before it; in messages, an image is a part of its "
            'own, {"type": "image"}.'
        )
    return "Remove it from the text."

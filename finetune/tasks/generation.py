"""Greedy generation for a batch: each row stops at its own end, and a callback gets its text in pieces."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from finetune.core.prediction import FinishReason, Text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from finetune.core.batch import Batch

    OnText = Callable[[int, str], object]  # row of the batch, new piece of its text
    IsStopped = Callable[[int], bool]  # row of the batch

_ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of SentencePiece's byte fallback


@dataclass(frozen=True, kw_only=True)
class Answer(Text):
    """A generated answer.

    Attributes:
        prompt_tokens: the number of tokens of the row's prompt, with those of its images and of a tuned prompt.
        completion_tokens: the number of generated tokens, with the one that ends the answer.
    """

    prompt_tokens: int
    completion_tokens: int


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    *,
    max_new_tokens: Sequence[int],
    on_text: OnText | None = None,
    is_stopped: IsStopped | None = None,
) -> list[Answer]:
    """Return the greedy answer of each left-padded row; rows with different limits share the batch.

    Args:
        model: the model in eval mode, on the batch's device.
        tokenizer: the tokenizer of the model.
        batch: the batch of rows, each of which ends before its answer.
        max_new_tokens: the largest number of new tokens of each row.
        on_text: the function that gets a row's index and its new, non-empty text, between two steps and in this thread.
            The joined pieces of a row are the text of its answer. An error in it ends the generation of all rows.
        is_stopped: the function that returns, after each step, whether a row that is not at its end must stop.
    """
    rows = _Rows(model, tokenizer, max_new_tokens, on_text, is_stopped)
    model.generate(  # type: ignore[operator]
        **batch.inputs,
        max_new_tokens=max(max_new_tokens),
        do_sample=False,
        num_beams=1,
        stopping_criteria=StoppingCriteriaList([rows]),
    )
    return rows.answers(batch.inputs["attention_mask"].sum(dim=1).tolist())


class _Rows(StoppingCriteria):
    """The generated text of each row of a batch, and the reason for its end."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: Sequence[int],
        on_text: OnText | None,
        is_stopped: IsStopped | None,
    ):
        ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
        self._end_ids = frozenset(ends if isinstance(ends, list) else [ends])
        self._limits, self._on_text, self._is_stopped = max_new_tokens, on_text, is_stopped
        self._texts = [GrowingText(tokenizer) for _ in max_new_tokens]
        self._reasons: list[FinishReason | None] = [None] * len(max_new_tokens)

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Add the newest token of each row; return the mask of rows at their end, [B]."""
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self._reasons[row] is None:
                self._take(row, token)
        return torch.tensor([reason is not None for reason in self._reasons], device=input_ids.device)

    def answers(self, prompt_tokens: Sequence[int]) -> list[Answer]:
        """Return the answers. All rows must be at their end."""
        return [
            Answer(text=str(text), prompt_tokens=prompted, completion_tokens=len(text.ids), finish_reason=reason)
            for text, prompted, reason in zip(self._texts, prompt_tokens, self._reasons, strict=True)
            if reason is not None
        ]

    def _take(self, row: int, token: int) -> None:
        text = self._texts[row]
        text.ids.append(token)
        if token in self._end_ids:
            self._reasons[row] = "stop"
        elif len(text.ids) >= self._limits[row]:
            self._reasons[row] = "length"
        if self._on_text is not None and (piece := text.grown()):
            self._on_text(row, piece)
        if self._reasons[row] is None and self._is_stopped is not None and self._is_stopped(row):
            self._reasons[row] = "stop"
        if self._reasons[row] is not None and self._on_text is not None and (piece := text.rest()):
            self._on_text(row, piece)


class GrowingText:
    """The text of tokens that come one by one, returned as soon as no later token can change it.

    Three things are held back: the bytes of an incomplete character, white space at the end, and the whole text if the
    tokenizer cleans up spaces after decoding.

    Attributes:
        ids: the ids of the tokens; the caller appends one at a time.

    Args:
        tokenizer: the tokenizer of these ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._comes_whole = _mends_spaces(tokenizer)
        # Only tokens from the first of these two indices on are decoded again. From the second index on, a tokenizer
        # that drops a space at the beginning of a text would lose one.
        self._before = self._settled = 0
        self._text = ""  # of all tokens before the second index
        self._num_given = 0  # returned characters, without outer white space

    def __str__(self) -> str:
        """Return the text of all tokens, without special tokens and outer white space."""
        return self._decode(0, None).strip()

    def grown(self) -> str:
        """Return the text that became certain since the last call; call this after each token."""
        if self._comes_whole or not self._decode(
            len(self.ids) - 1, None
        ):  # a special token does not end a run of bytes
            return ""
        if _ONE_BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(self.ids[-1]))):
            return ""  # a later byte may also change the characters before it
        before, new = (self._decode(self._before, end) for end in (self._settled, None))
        if new.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._text += new[len(before) :]
        self._before, self._settled = self._settled, len(self.ids)
        return self._give(self._text.strip())

    def rest(self) -> str:
        """Return the rest of the text, after the last token."""
        return self._give(str(self))

    def _give(self, text: str) -> str:
        piece = text[self._num_given :]
        self._num_given += len(piece)
        return piece

    def _decode(self, start: int, end: int | None) -> str:
        return str(self._tokenizer.decode(self.ids[start:end], skip_special_tokens=True))


def _mends_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether later tokens may change the beginning of the text of the earlier ones."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    mends_bpe = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return backend is None or type(backend.model).__name__ != "BPE" or mends_bpe

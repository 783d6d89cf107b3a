"""A collator of conversations: chat template, encoding by the family, and labels on the assistant's turns."""

from __future__ import annotations

import copy
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, cast

import torch

from finetune.core.batch import Batch, Rendered
from finetune.data.aspect_ratio import most_aspect
from finetune.data.kept_rows import KeptRows
from finetune.data.lengths import Lengths, refused_by_processor
from finetune.data.marks import Marks
from finetune.data.media import open_images, refuse_media
from finetune.data.spans import SpanFinder, Tokenized, place_spans, require_placeholders
from finetune.errors import FinetuneError, ModelError, RowError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.core.batch import Features, OpenedMedium
    from finetune.core.example import Example, Message
    from finetune.interfaces import GenerativeFamily, ModelFamily, PaddingSide, RowLengths
    from finetune.recipe import ReadSection


class FeatureLookup(Protocol):
    """A function that returns the stored features of the rows of a batch."""

    def __call__(self, rows: Sequence[Example], *, supervised: bool) -> Sequence[Features | None]:
        """Return the features of each row, ``supervised`` in a training batch; None for a row without any."""
        ...


KEPT_TOKENS = 1_000_000  # tokens of rendered rows that are kept, and as many of prompts


class Collator:
    """A collator that makes the batches of one model; rows with several images, one or none can share a batch.

    Args:
        family: the family of the model, which encodes its inputs.
        processor: the processor of the model.
        end_ids: the token ids that end a turn, the same as in generation.
        supervise: the assistant turns of a conversation that are supervised: all of them, or the last one.
        max_image_pixels: the largest width x height of an image, in pixels.
        num_embeddings: the number of tokens that the model has embeddings for; None for all tokens of the tokenizer.

    Raises:
        ModelError: if the processor has no token that stands for an image.
    """

    def __init__(
        self,
        family: GenerativeFamily,
        processor: ProcessorMixin,
        end_ids: Sequence[int],
        *,
        supervise: Literal["all", "last"] = "all",
        max_image_pixels: int = 50_000_000,
        num_embeddings: int | None = None,
    ):
        self.family, self.processor = family, processor
        self.end_ids = frozenset(end_ids)
        self.supervised_turns, self.max_image_pixels = supervise, max_image_pixels
        self.num_embeddings = num_embeddings
        image_id = getattr(processor, "image_token_id", None)
        if image_id is None:
            raise ModelError(
                "the processor must have an image_token_id, the token that stands for an image, but "
                f"{type(processor).__name__} has none. Use a base whose processor has one."
            )
        self.image_id = int(image_id)
        self._rows, self._prompts = KeptRows(KEPT_TOKENS), KeptRows(KEPT_TOKENS)
        bos = processor.tokenizer.bos_token_id
        begins = bos is not None and processor.tokenizer("a")["input_ids"][0] == bos
        self._features: FeatureLookup | None = None
        self._bos: str = processor.tokenizer.bos_token if begins else ""

    @classmethod
    def of_base(
        cls, family: ModelFamily, model: PreTrainedModel, processor: ProcessorMixin, data: ReadSection | None
    ) -> Self:
        """Return the collator of a base that generates text.

        Args:
            family: the family of the base.
            model: the base model.
            processor: the base's processor.
            data: the section with the supervised turns and the largest image; None for the defaults.

        Raises:
            ModelError: if no token ends an answer, or no token stands for an image.
        """
        ends = model.generation_config.eos_token_id
        end_ids = ends if isinstance(ends, list) else [ends]
        if not end_ids or end_ids == [None]:
            raise ModelError(
                f"{model.name_or_path}: the generation config must have an eos_token_id, the token that ends an "
                "answer, got none. Set it in generation_config.json."
            )
        embeddings = len(cast("torch.nn.Embedding", model.get_input_embeddings()).weight)
        options = data.model_dump(include={"supervise", "max_image_pixels"}) if data else {}
        return cls(cast("GenerativeFamily", family), processor, end_ids, num_embeddings=embeddings, **options)

    def lengths(self, *, key: str) -> RowLengths:
        """Return the counter of the rows' tokens; ``key`` must change with the processor."""
        return Lengths(self, key=key)

    @cached_property
    def max_aspect(self) -> int:
        """Return the largest ratio of an image's longer side to its shorter side."""
        return most_aspect(self.processor)

    @cached_property
    def marks(self) -> Marks:
        """Return the check for marks that no text may hold."""
        return Marks(self.processor, ids={self.image_id, *self.end_ids}, render=self.render)

    def render(self, messages: list[Message], *, for_answer: bool = False) -> str:
        """Return the conversation as text; ``for_answer`` opens the assistant's turn."""
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_answer)
        # LLaVA's template expects the tokenizer to add the first token, but here it adds none; others render it.
        return text if text.startswith(self._bos) else self._bos + text

    def training_batch(self, rows: Sequence[Example | tuple[Example, bool]]) -> Batch:
        """Return right-padded rows with labels; a row paired with False only fills up a batch and is not supervised."""
        examples = [row[0] if isinstance(row, tuple) else row for row in rows]
        counted = [row[1] if isinstance(row, tuple) else True for row in rows]
        rendered = [self.supervise(example) for example in examples]
        inputs = self._encode([r.text for r in rendered], examples, "right", supervised=True)
        input_ids = inputs["input_ids"]  # [B, T]
        labels = torch.full_like(input_ids, -100)
        ends = inputs["attention_mask"].sum(dim=1).tolist()
        for i, (row, end) in enumerate(zip(rendered, ends, strict=True)):
            encoded = input_ids[i, :end].tolist()
            for start, stop in place_spans(row, encoded, image_id=self.image_id, row=f"row {examples[i].id}"):
                if counted[i]:
                    labels[i, start:stop] = input_ids[i, start:stop]
        return Batch(self.family.mark_supervised(inputs, labels), examples, labels)

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Return left-padded rows that end where the answer begins."""
        return Batch(self._encode([self.prompt(e).text for e in examples], examples, "left"), list(examples))

    def supervise(self, example: Example) -> Tokenized:
        """Return the rendered row with its supervised tokens, which include those that end a turn.

        This renders a row many times, so the result is kept for the next epoch.

        Raises:
            DataError: if the base does not take a medium of the row, its supervised tokens cannot be located, or a text
                holds a mark.
        """
        refuse_media(example, self.family)
        key = (repr(example.messages), example.media_types, example.unsupervised)
        if known := self._rows.get(key):
            return known
        self.marks.refuse(example)
        rendered = self._finder().find(example, supervise=self.supervised_turns)
        self._refuse_unknown(rendered.ids, f"row {example.id}")
        self._rows.keep(key, rendered)
        return rendered

    def prompt(self, example: Example) -> Tokenized:
        """Return the rendered row up to the beginning of its last turn; it is kept for the next evaluation.

        Raises:
            DataError: if the base does not take a medium of the row, the chat template cannot render it, or a text
                holds a mark.
        """
        refuse_media(example, self.family)
        key = (repr(example.messages), example.media_types)  # marks are refused in all messages
        if known := self._prompts.get(key):
            return known
        self.marks.refuse(example)
        row = f"row {example.id}"
        text = self._finder().render(example.prompt, row, for_answer=True)
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        require_placeholders(ids, self.image_id, len(example.images), row=row)
        self._refuse_unknown(ids, row)
        rendered = Tokenized(text, ids, [])
        self._prompts.keep(key, rendered)
        return rendered

    def encode(self, rows: Sequence[Rendered], padding_side: PaddingSide) -> dict[str, Any]:
        """Return the model's inputs of rendered rows."""
        return self.family.encode(self.processor, rows, padding_side=padding_side)

    def copy(self) -> Collator:
        """Return a collator with its own processor, because a processor serves one thread at a time.

        It keeps no rows: those of a server are the requests of its clients.
        """
        other = copy.copy(self)
        other._rows, other._prompts = KeptRows(0), KeptRows(0)
        other.processor = copy.deepcopy(self.processor)
        other.__dict__.pop("marks", None)  # they belong to the first processor
        return other

    def reading(self, features: FeatureLookup) -> Collator:
        """Return a collator that uses ``features`` in the place of images, and opens none of rows that have them."""
        other = copy.copy(self)
        other._features = features
        return other

    def show(self, example: Example) -> str:
        """Return the decoded row: each supervised part is between ⟦ and ⟧, and runs of image tokens are shortened."""
        batch = self.training_batch([(example, True)])
        assert batch.labels is not None
        supervised = (batch.labels[0] != -100).tolist()
        pieces = []
        for marked, run in groupby(zip(supervised, batch.inputs["input_ids"][0].tolist(), strict=True), lambda x: x[0]):
            text = _shorten(self.processor.tokenizer.decode, [token for _, token in run])
            pieces.append(f"⟦{text}⟧" if marked else text)
        return "".join(pieces).replace("\n", "⏎")

    def _finder(self) -> SpanFinder:
        return SpanFinder(self.render, self.processor.tokenizer, image_id=self.image_id, end_ids=self.end_ids)

    def _encode(
        self, texts: list[str], examples: Sequence[Example], padding_side: PaddingSide, *, supervised: bool = False
    ) -> dict[str, Any]:
        media = self._opened(examples, supervised)
        rows = [Rendered(text, opened) for text, opened in zip(texts, media, strict=True)]
        try:
            return self.encode(rows, padding_side)
        except FinetuneError:
            raise
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:  # errors of processors
            for row, example in zip(rows, examples, strict=True):
                try:
                    self.encode([row], padding_side)
                except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as own:
                    raise refused_by_processor(f"row {example.id}", self.processor, own) from None
            raise error

    def _opened(self, examples: Sequence[Example], supervised: bool) -> list[tuple[OpenedMedium, ...]]:
        """Return the media of each row, which are images: rendering the row has refused all other media."""
        if self._features is None:
            return [tuple(self.open(example)) for example in examples]
        found = self._features(examples, supervised=supervised)
        return [
            tuple(self.open(row)) if features is None else (features,)
            for row, features in zip(examples, found, strict=True)
        ]

    def _refuse_unknown(self, ids: Sequence[int], row: str) -> None:
        """Raise RowError if the model has no embedding for a token; features replace the tokens of images."""
        if self.num_embeddings is None:
            return
        strange = next((token for token in ids if token >= self.num_embeddings and token != self.image_id), None)
        if strange is not None:
            token = self.processor.tokenizer.convert_ids_to_tokens(strange)
            raise RowError(
                f"{row}: every token must have an embedding, got {token!r} (token {strange}), and the base has "
                f"embeddings for {self.num_embeddings} tokens only. Use the tokenizer that belongs to these weights, "
                "or take such texts out.",
                reason="token without an embedding",
            )

    def open(self, example: Example) -> list[Image]:
        """Return the row's images.

        Raises:
            RowError: if an image cannot be used.
        """
        return open_images(example, max_pixels=self.max_image_pixels, max_aspect=self.max_aspect)


def _shorten(decode: Any, ids: list[int]) -> str:
    """Decode ids, writing a run of more than three equal tokens as ``token×n``."""
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

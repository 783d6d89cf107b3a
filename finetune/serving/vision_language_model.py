"""The model of an app: load verified adapters on a base, ask questions, and switch adapters by name."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from finetune.assemble.batches import Batches
from finetune.core.prediction import Label
from finetune.errors import DataError, ModelError, brief
from finetune.recipe import LabelSection, PromptSection
from finetune.serving.aliases import ALIAS_SECONDS
from finetune.serving.asking import conversation_row, image_row, question_row
from finetune.serving.batching import (
    answer_limit,
    answer_rows,
    opened_as_trained,
    prompt_lengths,
    refuse_too_long,
    section_for,
)
from finetune.serving.streaming import TextStream
from finetune.serving.switcher import Switcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.assemble.base import Base
    from finetune.core.batch import Batch
    from finetune.core.example import Example, Message
    from finetune.core.prediction import Prediction
    from finetune.data.pairs import PairCollator
    from finetune.interfaces import Task
    from finetune.recipe import TaskSection
    from finetune.registry import AdapterRegistry
    from finetune.serving.loaded_adapter import LoadedAdapter
    from finetune.serving.urls import UrlPolicy
    from finetune.tasks.choosing import ChoosingTask
    from finetune.tasks.generation import Answer

S = TypeVar("S", PromptSection, LabelSection)

# How a model is asked for a caption whose training had none.
CAPTION_QUESTION = "Describe the picture."
CAPTION_TOKENS = 64  # of such a caption at most, where its answers to questions are not longer anyway


class VisionLanguageModel:
    """A base and the adapters loaded on it. ``model`` and ``processor`` are plain transformers objects.

    An image is a path, the bytes of a file, a PIL image, or pixels of numpy or torch: RGB, [H, W, 3] or [3, H, W],
    uint8 or floating-point numbers from 0 to 1. Where URLs are allowed, it is also a text that begins with ``http:``,
    ``https:`` or ``data:``.

    Any thread may call any method. From asyncio call them as ``await asyncio.to_thread(vlm.ask, image, question)``:
    the thread has the adapter of the task's own ``using`` block.

    Args:
        base: the loaded base, as ``load_base`` returns it.
        registry: the registry in which names are looked up; None for none.
        max_bytes: the limit, in bytes, for all loaded adapters together; None for no limit. See ``Switcher``.
        alias_seconds: the number of seconds for which a resolved alias is reused. See ``Switcher``.
        urls: the policy by which images are fetched from URLs; None to fetch none.
    """

    def __init__(
        self,
        base: Base,
        *,
        registry: AdapterRegistry | None = None,
        max_bytes: int | None = None,
        alias_seconds: float = ALIAS_SECONDS,
        urls: UrlPolicy | None = None,
    ):
        self.base, self.urls = base, urls
        self.switcher = Switcher(base, registry=registry, max_bytes=max_bytes, alias_seconds=alias_seconds)

    @property
    def model(self) -> PreTrainedModel:
        """The base model with its adapters, an object of its own transformers class."""
        return self.base.model

    @property
    def processor(self) -> ProcessorMixin:
        """The base's processor."""
        return self.base.processor

    @property
    def adapter(self) -> LoadedAdapter | None:
        """The adapter that answers here and now; None for the plain base."""
        return self.switcher.active

    def add(self, ref: str | Path) -> LoadedAdapter:
        """Load an adapter beside the others, after every check; the active adapter does not change.

        Args:
            ref: a registry reference such as ``medical/brain-mri@prod``, or an adapter's folder.

        Raises:
            AdapterError: it is damaged, or does not fit the base; base and other adapters are untouched.
            NotFoundError: the registry has no such adapter.
        """
        return self.switcher.add(ref)

    def remove(self, ref: str | Path | LoadedAdapter) -> None:
        """Remove a loaded adapter; requests that it already answers run to their end.

        Raises:
            AdapterError: it is not loaded.
        """
        self.switcher.remove(ref)

    @contextmanager
    def using(self, ref: str | Path | LoadedAdapter | None) -> Iterator[VisionLanguageModel]:
        """Answer with another adapter inside the ``with`` block, in this thread or task alone; None is the plain base.

        A thread that is started inside does not inherit it: see ``Switcher``.
        """
        with self.switcher.using(ref):
            yield self

    def use(self, ref: str | Path | LoadedAdapter | None) -> None:
        """Answer with another adapter from now on, outside of ``using`` blocks; None is the plain base.

        It is loaded first where it is not yet.
        """
        self.switcher.use(ref)

    def ask(self, image: Any, question: str) -> str:
        """Return the answer to one question, put exactly as the active adapter was trained.

        Args:
            image: an image; None for a question without one, a list for one with several.
            question: the user's words.

        Raises:
            DataError: the image cannot be used.
            ModelError: the base is a dual encoder.
        """
        return self.answer(image, question).text

    def answer(self, image: Any, question: str) -> Answer:
        """Return the answer that ``ask`` gives, with the reason why it ended and its number of tokens.

        ``finish_reason`` is ``length`` where the answer was cut at the length that the adapter was trained to give.
        Arguments and errors are those of ``ask``.
        """
        with self.switcher.holding():
            row = self._question("ask", image, question)
            return answer_rows(self.switcher, [row], [self.adapter])[0]

    def stream(self, image: Any, question: str) -> TextStream:
        """Return the answer that ``ask`` would give, in pieces, while it is made.

        The adapter that is active now answers to the end, also where the ``using`` block ends before. See
        ``TextStream`` for leaving before the end, which is best done by a ``with`` block.
        """
        with self.switcher.holding():
            return self._stream(self._question("stream", image, question))

    def caption(self, image: Any) -> str:
        """Return a description of an image.

        An adapter trained on captions is asked exactly as it was trained. Any other, and the base, is asked
        ``CAPTION_QUESTION`` as it is asked any question, for ``CAPTION_TOKENS`` tokens, or as many as its answers may
        have.

        Args:
            image: an image, as ``ask`` takes it.

        Raises:
            DataError: the image cannot be used.
            ModelError: the base is a dual encoder.
        """
        with self.switcher.holding() as loaded:
            options = self._options(PromptSection, "caption(image)")
            question = CAPTION_QUESTION
            longest = max(CAPTION_TOKENS, options.longest_answer) if loaded else None
            if loaded and options.caption_question is not None:
                question, longest = options.caption_question, None
            return self._generate(question_row(options, image, question, urls=self.urls), max_new_tokens=longest)

    def ask_batch(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        *,
        adapters: Sequence[str | Path | LoadedAdapter | None] | None = None,
    ) -> list[str]:
        """Return the answers to many questions, each as ``ask`` would give it, in as few batches as possible.

        Args:
            images: the image of each question, as ``ask`` takes it.
            questions: the users' words, one text for each question.
            adapters: the adapter that answers each question, as ``using`` takes it; it is loaded first where it is not
                yet. None for the active adapter.

        Raises:
            DataError: the lists are of different lengths, or an image cannot be used.
            ModelError: the base is a dual encoder.
        """
        for name, given in (("images", images), ("questions", questions), ("adapters", adapters)):
            if isinstance(given, str | bytes):  # a sequence too, of characters
                raise DataError(f"ask_batch takes a list of {name}, not {brief(given)}; for one question there is ask")
        with ExitStack() as kept:
            if adapters is None:
                self._options(PromptSection, "ask_batch(images, questions)")
                adapters = [kept.enter_context(self.switcher.holding())] * len(questions)
            if not len(images) == len(questions) == len(adapters):
                raise DataError(
                    f"ask_batch was given {len(images)} images, {len(questions)} questions and {len(adapters)} "
                    "adapters; it takes one of each for every answer"
                )
            loaded_adapters = [kept.enter_context(self.switcher.pin(ref)) for ref in adapters]
            examples = []
            for index, (image, question, loaded) in enumerate(zip(images, questions, loaded_adapters, strict=True)):
                section = self._options(PromptSection, "ask_batch(images, questions)", loaded)
                examples.append(question_row(section, image, question, urls=self.urls, id=f"question {index}"))
            return [found.text for found in answer_rows(self.switcher, examples, loaded_adapters)]

    def chat(self, messages: list[Message]) -> str:
        """Return the assistant's next turn, prompted exactly as the active adapter was trained on conversations.

        Args:
            messages: the conversation in Hugging Face's chat format, which ends with the user's turn; images stand in
                its parts as ``{"type": "image", "image": ...}``, in the forms that ``ask`` takes.

        Raises:
            DataError: ``messages`` is no such conversation, or an image cannot be used.
            ModelError: the base is a dual encoder.
        """
        with self.switcher.holding():
            return self._generate(self._conversation("chat", messages))

    def stream_chat(self, messages: list[Message]) -> TextStream:
        """Return the turn that ``chat`` would give, in pieces, while it is made; as ``stream`` does."""
        with self.switcher.holding():
            return self._stream(self._conversation("stream_chat", messages))

    def classify(self, image: Any, labels: Sequence[str]) -> str:
        """Return the label whose text lies closest to an image, put into the words that the adapter was trained on.

        Args:
            image: an image.
            labels: the texts to choose from, at least one.

        Raises:
            ModelError: the base is no dual encoder.
            DataError: there is no label.
        """
        with self.switcher.holding():
            options = self._options(LabelSection, "classify(image, labels)")
            if not labels or isinstance(labels, str):
                raise DataError(f"labels is a list of at least one text, not {labels!r}")
            choices = {label: options.text_of(label) for label in labels}
            example = replace(image_row(image, urls=self.urls), choices=choices)
            batch = self.prompt_batch([example]).to(self.model.device, self.model.dtype)
            (prediction,) = self.task.predict(self.model, batch)
            assert isinstance(prediction, Label)
            return prediction.label

    def predict(self, image: Any, question: str = "") -> Prediction:
        """Return the prediction of the active adapter's task: a text, a label with scores, a number, ...

        Args:
            image: an image, as ``ask`` takes it.
            question: the user's words, where the task has a question.

        Raises:
            DataError: the image cannot be used, or the row is longer than the base takes.
            ModelError: the task chooses among labels, which ``classify`` is given.
        """
        with self.switcher.holding():
            task = self.task
            if isinstance(task.options, LabelSection):
                raise ModelError(f"predict(image) does not go with task {task.options.name}: use {task.options.call}")
            row = question_row(task.options, image, question, urls=self.urls)
            batch, room = self.prompt_batch([row]), task.options.answer_room
            if isinstance(task.options, PromptSection):
                room = answer_limit(self.switcher, self.adapter, None, prompt_tokens=prompt_lengths(batch)[0])
                task = self.base.task(task.options.model_copy(update={"max_new_tokens": room}))
            refuse_too_long(self.base, batch, [room])
            return task.predict(self.model, batch.to(self.model.device, self.model.dtype))[0]

    def embed(self, image: Any) -> Tensor:
        """Return the embedding [D] of an image, fp32, of length 1.

        Raises:
            ModelError: the base is no dual encoder.
        """
        return self._embed("embed(image)", lambda _: self.prompt_batch([image_row(image, urls=self.urls)]))

    def embed_text(self, text: str) -> Tensor:
        """Return the embedding [D] of a text as it stands, fp32, of length 1.

        Raises:
            ModelError: the base is no dual encoder.
            DataError: the text has more tokens than the base takes.
        """

        def batch(options: LabelSection) -> Batch:
            with self.base.preparing:
                return cast("PairCollator", self.base.collator_of(options)).text_batch([text])

        return self._embed("embed_text(text)", batch)

    def _embed(self, call: str, batch: Callable[[LabelSection], Batch]) -> Tensor:
        with self.switcher.holding():
            options = self._options(LabelSection, call)
            inputs = batch(options).to(self.model.device, self.model.dtype)
            return cast("ChoosingTask", self.task).embed(self.model, inputs)[0].cpu()

    def _options(self, section: type[S], call: str, loaded: LoadedAdapter | None | Literal["active"] = "active") -> S:
        options = section_for(self.switcher, self.adapter if loaded == "active" else loaded)
        if not isinstance(options, section):
            raise ModelError(
                f"{call} does not go with task {options.name} on a {self.base.family.model_type} base: use "
                f"{options.call}"
            )
        return options

    def _question(self, call: str, image: Any, question: str) -> Example:
        options = self._options(PromptSection, f"{call}(image, question)")
        return question_row(options, image, question, urls=self.urls)

    def _conversation(self, call: str, messages: list[Message]) -> Example:
        options = self._options(PromptSection, f"{call}(messages)")
        return conversation_row(options, messages, urls=self.urls)

    def _generate(self, example: Example, *, max_new_tokens: int | None = None) -> str:
        """Return the answer of the active adapter, which the caller has pinned."""
        limits = [max_new_tokens]
        return answer_rows(self.switcher, [example], [self.adapter], max_new_tokens=limits)[0].text

    def _stream(self, example: Example) -> TextStream:
        kept = ExitStack()
        loaded = kept.enter_context(self.switcher.pin_active())
        return TextStream(partial(answer_rows, self.switcher, [example], [loaded]), kept)

    def prompt_batch(self, examples: Sequence[Example], *, options: TaskSection | None = None) -> Batch:
        """Return the inputs of rows to answer, with the placeholders that the active adapter fills.

        Args:
            examples: the rows.
            options: the section of the task that makes the batch; None for that of the active adapter.
        """
        places = self.adapter.placeholders if self.adapter else None
        examples = [opened_as_trained(example, self.adapter) for example in examples]
        with self.base.preparing:
            collator = self.base.collator_of(options or section_for(self.switcher, self.adapter))
            return Batches(collator, places).prompt_batch(examples)

    @property
    def task(self) -> Task:
        """The task of the active adapter, with its options; for the plain base, the default task."""
        return self.base.task(section_for(self.switcher, self.adapter))

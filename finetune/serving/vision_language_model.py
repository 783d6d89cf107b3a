"""The model of an app: ask questions, chat, classify and embed with the active adapter."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from finetune.core.prediction import Label
from finetune.errors import DataError, ModelError, brief
from finetune.lookup import did_you_mean
from finetune.recipe import CAPTION_QUESTION, AnswerSection, LabelSection, PromptSection
from finetune.serving.adapted_model import AdaptedModel
from finetune.serving.asking import conversation_row, image_row, question_row
from finetune.serving.batching import answer_limit, answer_rows, prompt_lengths, refuse_too_long, section_for
from finetune.serving.streaming import TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from finetune.core.batch import Batch
    from finetune.core.example import Example, Message
    from finetune.core.prediction import Prediction
    from finetune.data.pairs import PairCollator
    from finetune.recipe import TaskSection
    from finetune.serving.loaded_adapter import LoadedAdapter
    from finetune.tasks.choosing import ChoosingTask
    from finetune.tasks.generation import Answer

# The limit of a caption by the base, or by an adapter trained without captions, unless its answers may be longer.
CAPTION_TOKENS = 64


class VisionLanguageModel(AdaptedModel):
    """A base and the adapters loaded on it, with one method for each use. See ``AdaptedModel`` for its adapters.

    An image is a path, the bytes of a file, a PIL image, or pixels of numpy or torch: RGB, [H, W, 3] or [3, H, W],
    uint8 or floating-point numbers from 0 to 1. If URLs are allowed, it is also a text that begins with ``http:``,
    ``https:`` or ``data:``.

    Any thread may call any method. From asyncio call them as ``await asyncio.to_thread(vlm.ask, image, question)``:
    the thread has the adapter of the task's own ``using`` block.

    The arguments are those of ``AdaptedModel``.
    """

    def ask(self, image: Any, question: str) -> str:
        """Return the answer to one question, with the prompt of the active adapter's training.

        Args:
            image: an image; None for a question without one, a list for one with several.
            question: the text of the user.

        Raises:
            DataError: the image cannot be used.
            ModelError: the base is a dual encoder.
        """
        return self.answer(image, question).text

    def answer(self, image: Any, question: str) -> Answer:
        """Return the answer that ``ask`` gives, with its finish reason and its number of tokens.

        ``finish_reason`` is ``length`` if the answer reached the longest answer in the adapter's training. Arguments
        and errors are those of ``ask``.
        """
        with self.switcher.holding():
            row = self._question("ask", image, question)
            return answer_rows(self.switcher, [row], [self.adapter])[0]

    def stream(self, image: Any, question: str) -> TextStream:
        """Return the answer that ``ask`` would give, in pieces, while it is generated.

        The adapter that is active now answers to the end, even if the ``using`` block ends before. Use a ``with`` block
        to leave the stream early: see ``TextStream``.
        """
        with self.switcher.holding():
            return self._stream(self._question("stream", image, question))

    def caption(self, image: Any) -> str:
        """Return a description of an image.

        An adapter trained on captions gets the prompt of its training. Any other adapter, and the base, gets
        ``CAPTION_QUESTION`` as a question. The limit is then ``CAPTION_TOKENS``, or that of its answers if larger.

        Args:
            image: an image, as ``ask`` takes it.

        Raises:
            DataError: the image cannot be used.
            ModelError: the base is a dual encoder, or the task of the adapter chooses among labels.
        """
        with self.switcher.holding() as loaded:
            options = self._options(PromptSection, "caption(image)")
            if options.allowed_answers is not None:
                raise ModelError(f"caption(image) does not support task {options.name}. Use {options.call}.")
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
            questions: the texts of the users.
            adapters: the adapter that answers each question, as ``using`` takes it; it is loaded first if
                necessary. None for the active adapter.

        Raises:
            DataError: the lists are of different lengths, or an image cannot be used.
            ModelError: the base is a dual encoder.
        """
        for name, given in (("images", images), ("questions", questions), ("adapters", adapters)):
            if isinstance(given, str | bytes):  # a sequence too, of characters
                raise DataError(f"`{name}` must be a list, got {brief(given)}. For one question use ask().")
        with ExitStack() as kept:
            if adapters is None:
                self._options(PromptSection, "ask_batch(images, questions)")
                adapters = [kept.enter_context(self.switcher.holding())] * len(questions)
            if not len(images) == len(questions) == len(adapters):
                raise DataError(
                    f"ask_batch needs one image, question and adapter for each answer, got {len(images)} images, "
                    f"{len(questions)} questions and {len(adapters)} adapters"
                )
            loaded_adapters = [kept.enter_context(self.switcher.pin(ref)) for ref in adapters]
            examples = []
            for index, (image, question, loaded) in enumerate(zip(images, questions, loaded_adapters, strict=True)):
                section = self._options(PromptSection, "ask_batch(images, questions)", loaded)
                examples.append(question_row(section, image, question, urls=self.urls, id=f"question {index}"))
            return [found.text for found in answer_rows(self.switcher, examples, loaded_adapters)]

    def chat(self, messages: list[Message]) -> str:
        """Return the assistant's next turn, with the prompt of the active adapter's training on conversations.

        Args:
            messages: the conversation in Hugging Face's chat format, which ends with the user's turn; an image is a
                part ``{"type": "image", "image": ...}``, in the forms that ``ask`` takes.

        Raises:
            DataError: ``messages`` is not such a conversation, or an image cannot be used.
            ModelError: the base is a dual encoder.
        """
        with self.switcher.holding():
            return self._generate(self._conversation("chat", messages))

    def stream_chat(self, messages: list[Message]) -> TextStream:
        """Return the turn that ``chat`` would give, in pieces, while it is generated, as ``stream`` does."""
        with self.switcher.holding():
            return self._stream(self._conversation("stream_chat", messages))

    def classify(self, image: Any, labels: Sequence[str] | None = None) -> str:
        """Return the label that fits an image best.

        On a dual encoder, it is the label whose text is closest to the image, in the template of the adapter's
        training. On a base that generates text, the task of the active adapter must choose among labels; ``predict``
        returns their scores too.

        Args:
            image: an image.
            labels: the texts to choose from, at least one; a dual encoder needs them. For any other base some of the
                labels of the adapter's training, by default all.

        Raises:
            ModelError: the base is no dual encoder, and the task of the adapter does not choose among labels.
            DataError: ``labels`` is empty or not a list, or the adapter does not have one of them.
        """
        with self.switcher.holding():
            section = section_for(self.switcher, self.adapter)
            if isinstance(section, AnswerSection) and section.allowed_answers is not None:
                return str(self._label(section, image, labels))
            options = self._options(LabelSection, "classify(image, labels)")
            if not labels or isinstance(labels, str):
                raise DataError(f"`labels` must be a list of at least one text, got {labels!r}")
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
            question: the text of the user, if the task has a question; a task that chooses among labels has its own.

        Raises:
            DataError: the image cannot be used, or the row has more tokens than the base takes.
            ModelError: the task chooses among labels, so it needs ``classify``.
        """
        with self.switcher.holding():
            task = self.task
            if isinstance(task.options, LabelSection):
                raise ModelError(f"predict(image) does not support task {task.options.name}. Use {task.options.call}.")
            return self._predict(task.options, image, question or task.options.own_question or "")

    def embed(self, image: Any) -> Tensor:
        """Return the embedding [D] of an image, fp32, of length 1.

        Raises:
            ModelError: the base is not a dual encoder.
        """
        return self._embed("embed(image)", lambda _: self.prompt_batch([image_row(image, urls=self.urls)]))

    def embed_text(self, text: str) -> Tensor:
        """Return the embedding [D] of a text without a template, fp32, of length 1.

        Raises:
            ModelError: the base is not a dual encoder.
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

    def _predict(self, options: TaskSection, image: Any, question: str) -> Prediction:
        row = question_row(options, image, question, urls=self.urls)
        batch, room = self.prompt_batch([row]), options.answer_room
        if isinstance(options, PromptSection):
            room = answer_limit(self.switcher, self.adapter, None, prompt_tokens=prompt_lengths(batch)[0])
            options = options.model_copy(update={"max_new_tokens": room})
        refuse_too_long(self.base, batch, [room])
        task = self.base.task(options)
        return task.predict(self.model, batch.to(self.model.device, self.model.dtype))[0]

    def _label(self, options: AnswerSection, image: Any, labels: Sequence[str] | None) -> Prediction:
        """Return the prediction of the active adapter, whose task chooses among labels."""
        known = options.allowed_answers or []
        if labels is not None and (not labels or isinstance(labels, str)):
            raise DataError(f"`labels` must be a list of at least one text, got {labels!r}")
        for label in labels or ():
            if label not in known:
                raise DataError(
                    f"`labels` must be among the labels of the adapter's training, {brief(known, 200)}, got "
                    f"{brief(label)}.{did_you_mean(label, known)}"
                )
        options = options.model_copy(update={"labels": [*dict.fromkeys(labels or known)]})
        return self._predict(options, image, options.own_question or "")

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

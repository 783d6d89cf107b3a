"""An app's view: load a verified adapter on its base, ask, and swap adapters by name."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from finetune.adapters.base_identity import require_same_base, require_same_processor
from finetune.adapters.contract import section_of
from finetune.adapters.folder import AdapterFolder, read_folder
from finetune.adapters.manifest import AdapterManifest, sha256_hex
from finetune.adapters.probe import ProbeResult, compare
from finetune.adapters.reference import as_folder
from finetune.build import Base, Batches
from finetune.data.conversation import num_image_parts, read_conversation
from finetune.data.images import as_source
from finetune.errors import (
    DataError,
    ManifestError,
    ModelError,
    NotFoundError,
)
from finetune.example import Example, answer, show
from finetune.methods.adapter import attach_saved, detach, placeholders, require_expected
from finetune.recipe import ContrastiveSection, VqaSection, why_impossible
from finetune.serving.switcher import Switcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.batch import Batch, Placeholders
    from finetune.data.pairs import PairCollator
    from finetune.example import Message
    from finetune.interfaces import Task
    from finetune.registry import AdapterRegistry
    from finetune.tasks.contrastive import ContrastiveTask

S = TypeVar("S", VqaSection, ContrastiveSection)


@dataclass(frozen=True)
class Resident:
    """One adapter that is ready to answer."""

    ref: str  # as it was first asked for
    internal_name: str  # what the layers know it by
    manifest: AdapterManifest
    placeholders: Placeholders | None  # what rows must hold for it
    probe: ProbeResult  # how its effect here compares with the one recorded when it was saved


class VisionLanguageModel:
    """A base and the adapters loaded on it. ``model`` and ``processor`` are plain transformers objects.

    Args:
        base: from ``load_base``.
        registry: where names are looked up.
    """

    def __init__(self, base: Base, *, registry: AdapterRegistry | None = None):
        self.base = base
        self.registry = registry
        self.switcher = Switcher(base.model)
        self._residents: dict[str, Resident] = {}  # digest of the manifest -> resident
        self._current: Resident | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The base with its adapters, of its own transformers class."""
        return self.base.model

    @property
    def processor(self) -> ProcessorMixin:
        """The base's processor."""
        return self.base.processor

    @property
    def adapter(self) -> Resident | None:
        """The adapter that answers now; None for the plain base."""
        return self._current

    def add(self, ref: str | Path) -> Resident:
        """Loads an adapter beside those that are there, after every check; which one answers does not change.

        Args:
            ref: a registry reference such as ``medical/brain-mri@prod``, or an adapter's folder.

        Raises:
            AdapterError: it does not fit or is not what was saved; base and other adapters are untouched.
            NotFoundError: the registry has no such adapter.
        """
        path = as_folder(ref)
        if path is None:
            version = self._registry().resolve(str(ref))  # each time: an alias may have moved
            digest = version.digest
        else:
            folder = read_folder(path)
            digest = sha256_hex(folder.manifest.to_bytes())
        if digest not in self._residents:
            if path is None:
                if version.warning:
                    warnings.warn(version.warning, stacklevel=2)
                folder = read_folder(self._registry().pull(version))
            self._residents[digest] = self._attach(str(ref), digest, folder)
        return self._residents[digest]

    @contextmanager
    def using(self, ref: str | Path | None) -> Iterator[VisionLanguageModel]:
        """Answers with another adapter inside the ``with`` block; None is the plain base."""
        before = self._current
        self.use(ref)
        try:
            yield self
        finally:
            self._activate(before)

    def use(self, ref: str | Path | None) -> None:
        """Answers with another adapter from now on; loads it first if it is not resident."""
        self._activate(None if ref is None else self.add(ref))

    def ask(self, image: Any, question: str) -> str:
        """Returns the answer to one question, put exactly as the active adapter was trained.

        Args:
            image: a path, bytes, a PIL image or pixels [H, W, 3] uint8; None for a question without a picture, a list
                for one with several.
            question: the user's words.
        """
        images = image if isinstance(image, list) else [] if image is None else [image]
        options = self._options(VqaSection, "ask(image, question)", instead="classify(image, labels)")
        return self._answer(_row(options.ask(question, num_images=len(images)), images))

    def chat(self, messages: list[Message]) -> str:
        """Returns the assistant's next turn, prompted exactly as the active adapter was trained on conversations.

        Args:
            messages: in Hugging Face's chat format, the last one the user's; pictures stand in their parts as
                ``{"type": "image", "image": ...}``, as ``ask`` takes them.

        Raises:
            DataError: this is no such conversation.
        """
        options = self._options(VqaSection, "chat(messages)", instead="classify(image, labels)")
        conversation, images = read_conversation(messages, where="chat")
        if conversation[-1]["role"] != "user":
            raise DataError("chat: the conversation ends with the assistant; the last message is the one to answer")
        if len(images) != num_image_parts(conversation):
            raise DataError('chat: a part {"type": "image"} lacks its picture: put it under "image"')
        return self._answer(_row(options.converse(conversation), images))

    def classify(self, image: Any, labels: Sequence[str]) -> str:
        """Returns the label whose text lies closest to a picture, put into the words that the adapter learnt.

        Args:
            image: a path, bytes, a PIL image or pixels [H, W, 3] uint8.
            labels: what to choose from.

        Raises:
            ModelError: the base is no dual encoder.
            DataError: there is no label.
        """
        options = self._options(ContrastiveSection, "classify(image, labels)", instead="ask(image, question)")
        if not labels or isinstance(labels, str):
            raise DataError(f"labels is a list of at least one text, not {labels!r}")
        choices = {label: options.text_of(label) for label in labels}
        return self._answer(replace(_row(show(), [image]), choices=choices))

    def embed(self, image: Any) -> Tensor:
        """Returns the embedding [D] of a picture, fp32, of length 1.

        Raises:
            ModelError: the base is no dual encoder.
        """
        return self._embed(lambda: self.prompt_batch([_row(show(), [image])]))

    def embed_text(self, text: str) -> Tensor:
        """Returns the embedding [D] of a text as it stands, fp32, of length 1.

        Raises:
            ModelError: the base is no dual encoder.
            DataError: the text has more tokens than the base takes.
        """
        return self._embed(lambda: cast("PairCollator", self.base.collator).text_batch([text]))

    def _embed(self, batch: Callable[[], Batch]) -> Tensor:
        self._options(ContrastiveSection, "an embedding", instead="ask(image, question)")
        inputs = batch().to(self.model.device, self.model.dtype)
        return cast("ContrastiveTask", self.task).embed(self.model, inputs)[0].cpu()

    def _options(self, section: type[S], call: str, *, instead: str) -> S:
        options = self.task.options
        if not isinstance(options, section):
            raise ModelError(f"{call} does not go with a {self.base.family.model_type} base: use {instead}")
        return options

    def _answer(self, example: Example) -> str:
        batch = self.prompt_batch([example]).to(self.model.device, self.model.dtype)
        return self.task.predict(self.model, batch)[0]

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Returns the inputs of rows that are to be answered, with the places that the active adapter fills."""
        places = self._current.placeholders if self._current else None
        return Batches(self.base.collator, places).prompt_batch(examples)

    @property
    def task(self) -> Task:
        """How the active adapter is asked; a task's defaults for the plain base."""
        current = self._current
        return self.base.task(section_of(current.manifest.prompt) if current else self.base.default_task)

    def _registry(self) -> AdapterRegistry:
        if self.registry is None:
            raise NotFoundError("names are looked up in a registry, and this model was given none")
        return self.registry

    def _activate(self, resident: Resident | None) -> None:
        self.switcher.use(None if resident is None else resident.internal_name)
        self._current = resident

    def _attach(self, ref: str, digest: str, folder: AdapterFolder) -> Resident:
        manifest, name = folder.manifest, f"a_{digest[:16]}"
        require_same_base(manifest.base, self.base.identity)
        require_same_processor(manifest.processor, self.base.digests)
        if reason := why_impossible(manifest.prompt.name, manifest.base.model_type):
            raise ManifestError(f"the adapter's prompt contract is for another kind of base: {reason}")
        towers = self.base.towers
        require_expected(self.model, towers, manifest.adapter)
        before = self.switcher.active
        try:
            attach_saved(self.model, towers, name, manifest.adapter, folder.tensors)
            self.switcher.resident.add(name)
            self.switcher.refresh()
            verdict = self._probe(manifest, name)
            if verdict.verdict == "inconclusive":
                # Inside, as a warning may be an error.
                warnings.warn(
                    f"{ref}: its effect on the probe is below the noise of {self.model.dtype}, so it could not be "
                    "verified that it does what it did when it was saved",
                    stacklevel=2,
                )
        except BaseException:
            self.switcher.resident.discard(name)
            self.switcher.active = before
            detach(self.model, name)
            self.switcher.refresh()
            raise
        self.switcher.use(before)
        return Resident(ref, name, manifest, placeholders(manifest.adapter), verdict)

    def _probe(self, manifest: AdapterManifest, name: str) -> ProbeResult:
        self.switcher.use(None)
        off = self.base.probe(manifest.probe.seed)
        self.switcher.use(name)
        on = self.base.probe(manifest.probe.seed, placeholders(manifest.adapter))
        return compare(manifest.probe, off, on, dtype=self.model.dtype, quantization=self.base.quantization)


def _row(prompt: list[Message], images: list[Any]) -> Example:
    sources = [as_source(image) for image in images]
    return Example(id="question", messages=[*prompt, answer("")], images=sources, answers=[""])

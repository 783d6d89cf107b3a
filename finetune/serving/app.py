"""An app's view: load a verified adapter on its base, ask, and swap adapters by name."""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.base_identity import require_same_base, require_same_processor
from finetune.adapters.folder import AdapterFolder, read_folder
from finetune.adapters.manifest import AdapterManifest, PromptContract, sha256_hex
from finetune.adapters.probe import ProbeResult, compare
from finetune.adapters.reference import AdapterRef
from finetune.build import Base, Batches, load_base
from finetune.cache import cache_home, write_note
from finetune.data.conversation import num_image_parts, read_conversation
from finetune.data.images import as_source
from finetune.errors import AdapterReferenceError, BaseMismatchError, DataError, ManifestError, NotFoundError
from finetune.example import Example, answer
from finetune.lookup import did_you_mean
from finetune.methods.adapter import attach_saved, detach, expected_tensors, placeholders
from finetune.recipe import TaskSection
from finetune.registry import AdapterRegistry
from finetune.serving.switcher import Switcher

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.adapters.manifest import AdapterDescription, BaseIdentity
    from finetune.example import Message
    from finetune.interfaces import Batch, Placeholders, Task
    from finetune.recipe import Quantization


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
        return self._answer(self.task.options.ask(question, num_images=len(images)), images)

    def chat(self, messages: list[Message]) -> str:
        """Returns the assistant's next turn, prompted exactly as the active adapter was trained on conversations.

        Args:
            messages: in Hugging Face's chat format, the last one the user's; pictures stand in their parts as
                ``{"type": "image", "image": ...}``, as ``ask`` takes them.

        Raises:
            DataError: this is no such conversation.
        """
        conversation, images = read_conversation(messages, where="chat")
        if conversation[-1]["role"] != "user":
            raise DataError("chat: the conversation ends with the assistant; the last message is the one to answer")
        if len(images) != num_image_parts(conversation):
            raise DataError('chat: a part {"type": "image"} lacks its picture: put it under "image"')
        return self._answer(self.task.options.converse(conversation), images)

    def _answer(self, prompt: list[Message], images: list[Any]) -> str:
        sources = [as_source(image) for image in images]
        example = Example(id="question", messages=[*prompt, answer("")], images=sources, answers=[""])
        batch = self.prompt_batch([example]).to(self.model.device, self.model.dtype)
        return self.task.predict(self.model, batch)[0]

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Returns inputs that end where the answer begins, with the places that the active adapter fills."""
        places = self._current.placeholders if self._current else None
        return Batches(self.base.collator, places).prompt_batch(examples)

    @property
    def task(self) -> Task:
        """How the active adapter is asked; the task's defaults for the plain base."""
        if self._current is None:
            return self.base.task(TaskSection())
        return self.base.task(task_section(self._current.manifest.prompt))

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
        towers = self.base.towers
        _require_expected(expected_tensors(self.model, towers, manifest.adapter), manifest.adapter)
        before = self.switcher.active
        attach_saved(self.model, towers, name, manifest.adapter, folder.tensors)
        try:
            self.switcher.resident.add(name)
            self.switcher.refresh()
            verdict = self._probe(manifest, name)
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


def load(
    ref: str | Path,
    *,
    registry: str | Path | AdapterRegistry | None = None,
    base: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    quantization: Quantization | None = None,
    verify_base: str = "cached",
) -> VisionLanguageModel:
    """Loads an adapter on its base, after checking that they belong together and that it does what it did.

    Args:
        ref: a registry reference such as ``medical/brain-mri@prod``, an adapter's folder, or ``base``.
        registry: a folder or a registry; ``$FINETUNE_REGISTRY`` or ``~/.finetune/registry`` by default.
        base: the base's folder, hub id or embedded name; by default where this base was last seen.
        revision: of a hub id.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        dtype: what the base is held in.
        quantization: of its language tower, ``4bit`` or ``8bit``.
        verify_base: ``cached`` trusts digests of files that have not changed; ``full`` hashes every byte.

    Returns:
        The model with the adapter active.

    Raises:
        BaseMismatchError: the base is unknown or not the one the adapter was trained on.
        AdapterError: the adapter is not what was saved.
        NotFoundError: the registry has no such adapter.
    """
    if not isinstance(registry, AdapterRegistry):
        registry = AdapterRegistry(registry)
    if base is None:
        if str(ref) == "base":
            raise BaseMismatchError("ref 'base' is the plain base model: say which with base=")
        manifest = read_folder(as_folder(ref) or registry.pull(str(ref))).manifest
        base = find_base(manifest.base)
        revision = revision or manifest.base.revision
    vlm = VisionLanguageModel(
        load_base(base, revision=revision, device=device, dtype=dtype, quantization=quantization, verify=verify_base),
        registry=registry,
    )
    vlm.use(None if str(ref) == "base" else ref)
    return vlm


def as_folder(ref: str | Path) -> Path | None:
    """Returns the folder that ``ref`` means, or None where it is a registry reference.

    A text that reads as a reference is one, even where a folder of that name stands in the working directory.
    """
    if isinstance(ref, str):
        try:
            AdapterRef.parse(ref)
        except AdapterReferenceError:
            if not Path(ref).is_dir():
                raise
        else:
            return None
    return Path(ref)


def find_base(identity: BaseIdentity) -> str:
    """Returns where a base was last seen on this machine, or its hub id.

    Raises:
        BaseMismatchError: nobody has seen it.
    """
    note = _base_note(identity)
    if note.is_file():
        path = str(json.loads(note.read_text())["path"])
        if Path(path).is_dir():
            return path
    if identity.hub_id:
        return identity.hub_id
    raise BaseMismatchError(
        f"this adapter needs the {identity.model_type} base with identity {identity.digest[:16]} "
        f"({', '.join(identity.files)}), which has not been used on this machine. Give its folder: base=PATH."
    )


def remember_base(identity: BaseIdentity, path: str) -> None:
    """Notes where a base is, so that ``load`` finds it without being told."""
    if Path(path).is_dir():
        write_note(_base_note(identity), json.dumps({"path": str(Path(path).resolve())}))


def task_section(prompt: PromptContract) -> TaskSection:
    """Returns the task that repeats what an adapter was trained with."""
    return TaskSection(
        name="vqa",
        system_prompt=prompt.system_prompt,
        question_template=prompt.question_template,
        max_new_tokens=prompt.generation.max_new_tokens,
        answer_normalization=prompt.answer_normalization,
    )


def _base_note(identity: BaseIdentity) -> Path:
    return cache_home() / "bases" / f"{identity.digest}.json"


def _require_expected(expected: dict[str, tuple[int, ...]], description: AdapterDescription) -> None:
    """The adapter's tensors are exactly those its modules have on this base."""
    table = {name: tuple(entry.shape) for name, entry in description.tensors.items()}
    missing, extra = sorted(set(expected) - set(table)), sorted(set(table) - set(expected))
    if missing or extra:
        hint = did_you_mean(extra[0], missing) if extra else ""
        raise ManifestError(
            f"the adapter's tensors are not those its modules have: {len(missing)} missing "
            f"({', '.join(missing[:2])}), {len(extra)} unknown ({', '.join(extra[:2])}).{hint}"
        )
    for name, shape in expected.items():
        if table[name] != shape:
            raise ManifestError(f"{name} has shape {list(table[name])}; on this base it must be {list(shape)}")

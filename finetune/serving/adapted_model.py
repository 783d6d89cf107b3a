"""A base with its loaded adapters: add, remove and switch adapters, and make inputs for the active one."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeVar

from finetune.assemble.batches import Batches
from finetune.errors import ModelError
from finetune.recipe import LabelSection, PromptSection
from finetune.serving.aliases import ALIAS_SECONDS
from finetune.serving.batching import opened_as_trained, section_for
from finetune.serving.switcher import Switcher

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import Self

    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.assemble.base import Base
    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.interfaces import Task
    from finetune.recipe import TaskSection
    from finetune.registry import AdapterRegistry
    from finetune.serving.loaded_adapter import LoadedAdapter
    from finetune.serving.urls import UrlPolicy

S = TypeVar("S", PromptSection, LabelSection)


class AdaptedModel:
    """A base and the adapters loaded on it. ``model`` and ``processor`` are plain transformers objects.

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
        """The active adapter of this thread or task; None for the plain base."""
        return self.switcher.active

    def add(self, ref: str | Path) -> LoadedAdapter:
        """Load an adapter beside the others, after every check; the active adapter does not change.

        Args:
            ref: a registry reference such as ``medical/brain-mri@prod``, or an adapter's folder.

        Raises:
            AdapterError: the adapter is damaged, or does not fit the base; the base and other adapters are unchanged.
            NotFoundError: the registry has no such adapter.
        """
        return self.switcher.add(ref)

    def remove(self, ref: str | Path | LoadedAdapter) -> None:
        """Remove a loaded adapter; it still answers its running requests to their end.

        Raises:
            AdapterError: the adapter is not loaded.
        """
        self.switcher.remove(ref)

    @contextmanager
    def using(self, ref: str | Path | LoadedAdapter | None) -> Iterator[Self]:
        """Answer with another adapter inside the ``with`` block, in this thread or task alone; None is the plain base.

        A thread that starts inside the block does not inherit it: see ``Switcher``.
        """
        with self.switcher.using(ref):
            yield self

    def use(self, ref: str | Path | LoadedAdapter | None) -> None:
        """Answer with another adapter from now on, outside of ``using`` blocks; None is the plain base.

        The adapter is loaded first if necessary.
        """
        self.switcher.use(ref)

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

    def _options(self, section: type[S], call: str, loaded: LoadedAdapter | None | Literal["active"] = "active") -> S:
        options = section_for(self.switcher, self.adapter if loaded == "active" else loaded)
        if not isinstance(options, section):
            raise ModelError(
                f"{call} does not support task {options.name} on a {self.base.family.model_type} base. Use "
                f"{options.call}."
            )
        return options

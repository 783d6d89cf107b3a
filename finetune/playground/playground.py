"""The functions of the page: they return the catalog and the answers so far, as HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import DataError, FinetuneError, ModelError
from finetune.playground.answers import answer_side_by_side, read_image, read_words
from finetune.playground.catalog import read_catalog
from finetune.playground.examples import right_answer
from finetune.playground.markup import alert, cards, table
from finetune.recipe import LabelSection, PromptSection

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from finetune.playground.catalog import CatalogEntry
    from finetune.playground.examples import ExampleImage
    from finetune.recipe import TaskSection
    from finetune.registry import AdapterRegistry
    from finetune.serving.vision_language_model import VisionLanguageModel


class Playground:
    """The functions of the page, for one base that stays loaded; several people may use it at once.

    Args:
        vlm: the base.
        base: the name of the base that the user gave.
        registry: the registry in which adapters are looked up.
        refs: the adapters to offer; empty for the latest version of each.
        examples: the images to try; empty for none.

    Raises:
        ModelError: the page cannot ask this base.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        *,
        base: str,
        registry: AdapterRegistry,
        refs: Sequence[str],
        examples: Sequence[ExampleImage],
    ):
        self.vlm, self.base, self.registry, self.refs = vlm, base, registry, refs
        self.examples = list(examples)
        self.takes_labels = _takes_labels(vlm.base.default_task)
        self.entries: list[CatalogEntry] = self._read_catalog()

    @property
    def choices(self) -> list[str]:
        """The names of the adapters that can be chosen."""
        return [entry.name for entry in self.entries if entry.refusal is None]

    def table(self) -> str:
        """Return the registry's table."""
        return table(self.entries, where=self.registry.location)

    def look_again(self) -> str:
        """Read the registry again, and return its table; on an error, return the error and the old table."""
        try:
            self.entries = self._read_catalog()
        except FinetuneError as error:
            return alert(str(error)) + self.table()
        return self.table()

    def ask(self, image: Path | None, text: str | None, chosen: list[str]) -> Iterator[str]:
        """Yield the answers so far, as HTML, or one error message."""
        try:
            pixels = read_image(image)
            words = read_words(text or "", labels=self.takes_labels)
            entries = [self._entry(name) for name in chosen]
        except FinetuneError as error:
            yield alert(str(error))
            return
        asked = words if isinstance(words, str) else "Which fits best: " + ", ".join(words)
        right = right_answer(self.examples, image, asked) if image else None
        yield cards(asked, [], waiting=[None, *entries], right=right)
        answers = []
        for answer in answer_side_by_side(self.vlm, pixels, words, entries):
            answers.append(answer)
            yield cards(asked, answers, waiting=entries[len(answers) - 1 :], right=right)

    def _read_catalog(self) -> list[CatalogEntry]:
        return read_catalog(self.registry, self.refs, self.vlm.base.identity)

    def _entry(self, name: str) -> CatalogEntry:
        # Only entries of the catalog: a browser could send the path of any folder of this machine.
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise DataError(f"{name} is not in the catalog any more. Press 'Look at the registry again' and choose again.")


def _takes_labels(section: TaskSection) -> bool:
    """Return True if the task of a base chooses among labels, and False if it answers questions.

    Raises:
        ModelError: the task does neither.
    """
    if not isinstance(section, PromptSection | LabelSection):
        raise ModelError(
            f"The page needs a base whose task answers questions or chooses labels, got task {section.name}. Use it in "
            f"Python by {section.call}."
        )
    return isinstance(section, LabelSection)

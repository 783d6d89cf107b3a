"""A row of data as a task reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from finetune.core.example import Example, ImageSource
    from finetune.errors import RowError


class Row(Protocol):
    """A row of data as a task reads it; its methods are given the section of that task.

    Attributes:
        id: the id of the row, the same on every machine.
    """

    id: str

    @property
    def supervised_field(self) -> str:
        """The field that the row has: ``messages``, ``captions`` or ``answer``.

        Raises:
            RowError: the row has several of these fields, or none.
        """
        ...

    def conversation(self, task: Any) -> Example:
        """Return the example of a row that has ``messages``."""
        ...

    def question_and_answer(self, task: Any) -> Example:
        """Return the example of a row that has ``captions`` or ``answer``, with its question if the task has one."""
        ...

    def own(self, name: str) -> Any:
        """Return the value of one of the task's own ``columns``; None if the row has none."""
        ...

    def question(self) -> str:
        """Return the question of the row; the recipe's default question if the row has none."""
        ...

    def images(self) -> list[ImageSource]:
        """Return the sources of the images, in order."""
        ...

    def fault(self, key: str, what: str, *, reason: str) -> RowError:
        """Return the error that names file, line and column.

        Args:
            key: the key of the recipe's data section that names the column, or the name of one of the task's columns.
            what: the rule that does not hold, and the value that was found; it follows the name of the column.
            reason: the kind of fault in a few words, under which such rows are counted.
        """
        ...

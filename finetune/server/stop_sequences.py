"""Stop sequences: texts that end an answer. The client gets neither them nor the text after them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopSequences:
    """A filter that lets an answer through as it grows, up to the first stop sequence.

    A stop sequence may begin in one piece and end in another, so its possible beginning is held back.

    Attributes:
        found: True once a stop sequence has come.

    Args:
        texts: the texts that end the answer; empty for none.
    """

    def __init__(self, texts: Sequence[str] = ()):
        self._texts = texts
        self.start_anew()

    def start_anew(self) -> None:
        """Forget the text so far, for an answer that is generated again."""
        self.found = False
        self._held = ""

    def feed(self, piece: str) -> str:
        """Add ``piece``, and return the part of the answer that is certain now."""
        if self.found:
            return ""
        self._held += piece
        places = [place for text in self._texts if (place := self._held.find(text)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        kept = max((_overlap(self._held, text) for text in self._texts), default=0)
        sure, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return sure

    def rest(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        return "" if self.found else self._held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)

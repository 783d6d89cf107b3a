"""The display of text from outside: rows, answers, manifests and registry entries, on terminals, in logs and on pages.

Such text may hold control sequences of a terminal, characters that reorder or split a line, or markup. Programs get it
unchanged. These functions make it harmless for people. ``errors.brief`` quotes a value inside a message; the code that
prints the message calls one of these functions.
"""

import html
import logging
import re
from typing import Any, TextIO

# Control characters (C0, DEL, C1), marks and overrides of the writing direction, separators of lines and paragraphs,
# and halves of characters, which have no UTF-8.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_IN_BLOCK = re.compile(rf"(?![\n\t]){_UNSAFE.pattern}")
# Markup of Markdown and HTML, and addresses that renderers turn into links.
_MARKUP = re.compile(r"[\\`*\[\]<>|~&$@#]|://|www\.", re.IGNORECASE)


def safe_line(text: str, limit: int | None = None) -> str:
    r"""Return ``text`` as one line for a terminal, a log or a text file: ``\x1b`` in the place of an escape.

    Args:
        text: the text from outside.
        limit: the largest number of characters; None for no limit.
    """
    shown = _UNSAFE.sub(_escape, text if limit is None else text[: limit + 1])
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 3]}..."


def safe_block(text: str) -> str:
    """Return ``text`` as ``safe_line`` does, with its newlines and tabs kept."""
    return _UNSAFE_IN_BLOCK.sub(_escape, text)


def for_stream(text: str, stream: TextIO) -> str:
    """Return ``text`` as ``safe_block`` does for a terminal, and exactly as it is for a pipe or a file."""
    return safe_block(text) if stream.isatty() else text


def markdown(text: str) -> str:
    """Return ``text`` as a part of a line of Markdown, as inline code where it holds anything like markup."""
    shown = safe_line(" ".join(text.split()))
    return markdown_code(shown) if _MARKUP.search(shown) else shown


def markdown_code(text: str) -> str:
    """Return ``text`` as inline code of Markdown, in which markup has no effect."""
    shown = safe_line(" ".join(text.split()))
    if "`" not in shown:
        return f"`{shown or ' '}`"
    fence = "`" * (_longest_run(shown) + 1)
    return f"{fence} {shown} {fence}"


def markdown_cell(text: str) -> str:
    """Return ``text`` as ``markdown`` does, for the cell of a table."""
    # A renderer splits a table at each | without a backslash before it, and reads code later. Renderers differ on two
    # backslashes, so a wide backslash replaces each one of the text.
    shown = markdown(text)
    return shown.replace("\\", "\uff3c").replace("|", "\\|") if "|" in shown else shown


def markdown_block(code: str, language: str) -> str:
    """Return code as a fenced block of Markdown that the code cannot end."""
    code = safe_block(code)
    fence = "`" * max(3, _longest_run(code) + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def html_text(text: str) -> str:
    """Return ``text`` for the content or an attribute of HTML."""
    return html.escape(safe_block(text))


class LogFormatter(logging.Formatter):
    """A formatter of log records with arguments from outside: the message on one line, tracebacks as blocks."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message on one line."""
        return safe_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """Return the traceback."""
        return safe_block(super().formatException(ei))


def _escape(match: re.Match[str]) -> str:
    return repr(match[0])[1:-1]  # nothing that matches is printable


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)

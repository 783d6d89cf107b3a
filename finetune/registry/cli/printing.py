"""The output of ``finetune registry``: tables and lines for people, JSON for programs."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from finetune.core.outside_text import safe_block, safe_line
from finetune.registry.log.versions import Version

_MAX_CELL = 2000  # characters; a limit on the width of all rows


def answer(args: argparse.Namespace, value: Any, text: str) -> int:
    """Print the answer of a verb, ``value`` as JSON with ``--json``, else ``text``; return the exit code 0."""
    print(_as_json(value) if args.json else safe_block(text))
    return 0


def _as_json(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, indent=2)
    # One element per line: Python indents so slowly that a list of 10,000 would take a second.
    return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"


def warn(version: Version) -> None:
    """Print the warning of a version to stderr, where it has one."""
    if version.warning:
        print(f"warning: {safe_line(version.warning)}", file=sys.stderr)


def version_json(version: Version) -> dict[str, Any]:
    """Return a version as a JSON object."""
    return {"ref": version.ref, **vars(version), "warning": version.warning}


def one_line(version: Version) -> str:
    """Return a version as a line of text."""
    return f"{version.ref} (aliases: {', '.join(version.aliases)}; sha256:{version.digest})"


def flat(value: Any) -> str:
    """Return a value of a summary as the cell of a table."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {flat(part)}" for key, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text in columns, the first row the heading."""
    cells = [[safe_line(cell, _MAX_CELL) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)

"""The code blocks of a page in docs/."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def block(page: str, name: str) -> str:
    """Return the code that stands under the name of a file."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"`{re.escape(name)}`[^`]*?:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no code under {name}"
    return found[1]


def blocks(page: str, language: str) -> list[str]:
    """Return all code of a language, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)

"""The code blocks of README and of the pages in docs/, and their commands, run in this process."""

import os
import re
import runpy
import shlex
import sys
from pathlib import Path

from finetune.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = "../README.md"


def block(page: str, name: str) -> str:
    """Return the code that stands under the name of a file."""
    found = re.search(rf"`{re.escape(name)}`[^`]*?:\n\n```\w+\n(.*?)^```$", _text(page), re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no code under {name}"
    return found[1]


def blocks(page: str, language: str) -> list[str]:
    """Return all code of a language, in order."""
    return [code for found, code in all_blocks(page) if found == language]


def all_blocks(page: str) -> list[tuple[str, str]]:
    """Return language and code of all blocks, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", _text(page), re.MULTILINE | re.DOTALL)


def sections(page: str) -> dict[str, str]:
    """Return heading -> text of the sections of a page."""
    parts = re.split(r"^##+ (.*)$", _text(page), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands(code: str) -> list[list[str]]:
    """Return the words of each command of a shell block."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_page(page: str) -> None:
    """Run the `bash` and `python` blocks of a page in the current folder, as they stand there.

    A block under the name of a file is written into that file. `finetune`, `python FILE` and `export` run in this
    process; no other command may stand in a `bash` block.
    """
    named = r"`([\w.-]+)`[^`]*?:\n\n```(?:python|yaml)\n(.*?)^```$"
    for name, code in re.findall(named, _text(page), re.MULTILINE | re.DOTALL):
        Path(name).write_text(code, encoding="utf-8")
    files = {path.read_text(encoding="utf-8") for path in Path().iterdir() if path.suffix == ".py"}
    for language, code in all_blocks(page):
        if language == "python" and code not in files:
            exec(compile(code, page, "exec"), {"__name__": page})
        elif language == "bash":
            for words in commands(code):
                run(words)


def run(words: list[str]) -> None:
    """Run one command; it must succeed."""
    if words[0] == "export":
        name, _, value = words[1].partition("=")
        os.environ[name] = value.replace("$PWD", os.getcwd())
    elif words[0] == "python":
        argv, sys.argv = sys.argv, words[1:]
        try:
            runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = argv
    else:
        assert words[0] == "finetune", f"cannot run {words}"
        code = main(words[1:])
        assert code == 0, f"{words} ended with {code}"


def _text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")

"""README and docs/: every link leads somewhere, every command parses, every recipe can be read."""

import importlib.util
import re
import tomllib

import pytest

from finetune.cli import _parser
from finetune.launch.launcher import WORDS, find_config
from finetune.recipe import load_recipe, parse_recipe, read_value
from tests.docs_code import DOCS, README, ROOT, all_blocks, commands

PAGES = sorted(path.name for path in DOCS.glob("*.md")) + [README]
# Their commands have tests of their own: tests/registry, tests/server, tests/serving, tests/playground, tests/plugins.
OTHERS = {
    "app.md", "apps.md", "extend.md", "recipe.md", "registry.md", "serve.md", "support.md", "threat-model.md", "vllm.md"
}  # fmt: skip
OWN = [page for page in PAGES if page not in OTHERS]
WHOLE = {
    "name": "page",
    "domain": "docs",
    "model": {"name_or_path": "OWNER/BASE"},
    "method": {"name": "lora"},
    "data": {"source": "jsonl", "root": "rows"},
    "train": {"epochs": 1},
}


def anchors(text):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "../CONTRIBUTING.md", "../CHANGELOG.md"])
def test_links_lead_to_files_and_headings(page):
    path = DOCS / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\(([\w.-]+\.\w+)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert {page for page in PAGES if page not in ("README.md", README)} <= listed


def test_readme_is_a_front_door():
    text = (DOCS / README).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and text.count("![") == 1
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    named = set(re.findall(r"pip install (?:-e )?'(?:\.|finetune-vlm)\[([\w-]+)\]'", text))
    (others,) = re.findall(r"Other extras: (.*)\.", text)
    assert named | set(re.findall(r"`([\w-]+)`", others)) == extras.keys() - {"dev", "bench"}


@pytest.mark.parametrize("page", OWN)
def test_recipes_are_read(page, monkeypatch):
    monkeypatch.setenv("FINETUNE_DATA", "rows")
    for number, code in enumerate(code for language, code in all_blocks(page) if language == "yaml"):
        raw = read_value(code, source=page)
        assert parse_recipe({**WHOLE, **raw}, source=f"{page}, block {number}").run_folder


@pytest.mark.parametrize("page", OWN)
def test_commands_are_parsed(page, tmp_path, monkeypatch):
    text = (DOCS / page).read_text(encoding="utf-8") + (DOCS / "first-adapter.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"`([\w.-]+\.yaml)`[^`]*?:\n\n```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.setenv("FINETUNE_BASE", "pocket")
    monkeypatch.setenv("FINETUNE_DATA", "rows")
    for language, code in all_blocks(page):
        for words in commands(code) if language in ("bash", "sh") else ():
            check(words, page, tmp_path)


def check(words, page, folder):
    """Check one command: options, overrides, and the files of the checkout that it names."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    program = words[0].removeprefix(".venv/bin/")
    if program == "finetune":
        args = _parser().parse_args(words[1:])
        configs = [args.config] if "config" in args else getattr(args, "on", [])
        for config in configs:
            overrides = args.overrides if words[1] == "train" else []
            load_recipe(place(str(config), folder), overrides)
    elif program == "./launch.sh":
        if words[1] not in WORDS:
            load_recipe(place(words[1], folder), words[2:])
    elif words[:2] == ["python", "-m"]:
        module = importlib.util.find_spec(words[2])
        source = (ROOT / module.origin).read_text(encoding="utf-8")
        assert all(word in source for word in words[3:] if word.startswith("--")), words
    elif program == "python":
        assert words[1] in (DOCS / page).read_text(encoding="utf-8") or (DOCS / "examples" / words[1]).is_file()
    else:
        assert program in ("pip", "source", "export", "tensorboard"), words


def place(config, folder):
    return folder / config if (folder / config).is_file() else find_config(config)

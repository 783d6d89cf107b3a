"""CONTRIBUTING.md: its tree and levels are the present ones, and its examples work on a copy of the package."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.test_imports import LEVELS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = r":\n\n```python\n(.*?)^```$"
FILES = dict(re.findall(rf"^`(finetune/[\w/]+\.py)`{BLOCK}", TEXT, re.MULTILINE | re.DOTALL))
ENDS = re.findall(rf"^At the end of `(finetune/[\w/]+\.py)`{BLOCK}", TEXT, re.MULTILINE | re.DOTALL)
LINES = dict(re.findall(rf"^In `([A-Z_]+)` of `finetune/tables\.py`{BLOCK}", TEXT, re.MULTILINE | re.DOTALL))
TRAINING = """
import json, sys
from pathlib import Path

import torch
from transformers import LlavaProcessor, ViTImageProcessor, VipLlavaConfig, VipLlavaForConditionalGeneration

import finetune
from finetune.adapters.folder import read_folder
from finetune.recipe import load_recipe
from tests.tiny.parts import SIDE, save, template, text, tokenizer, vision

assert Path(finetune.__file__).is_relative_to(Path.cwd())
tokens = tokenizer()
torch.manual_seed(0)
config = VipLlavaConfig(
    vision_config={"model_type": "clip_vision_model", **vision()},
    text_config={"model_type": "llama", **text(tokens)},
    image_token_index=tokens.get_vocab()["<image>"],
    image_seq_length=16,
    vision_feature_layers=[-2, -1],
)
images = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
processor = LlavaProcessor(
    images, tokens, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
    num_additional_image_tokens=1, chat_template=template("<image>"),
)
save(VipLlavaForConditionalGeneration(config), processor, Path("base"))
run = finetune.train(load_recipe("recipe.yaml"))
manifest = read_folder(run.adapter).manifest
done = finetune.export_adapter("testing/pets", to="norms", output=Path("out"), base="base")
vlm = finetune.load("testing/pets", base="base", device="cpu")
label = vlm.predict("pets/test/yes/0.png", "Is it red?")
print(json.dumps([
    manifest.base.model_type, manifest.task.name, manifest.adapter.methods, manifest.training.rows["train"],
    sorted(manifest.metrics["test"]["values"]), sorted(json.loads((done.folder / "norms.json").read_text())),
    label.label, manifest.plugins,
]))
"""
RECIPE = """
name: pets
domain: testing
model: {name_or_path: base, device: cpu}
method: {name: tuned_head}
data: {source: class_folders, root: pets, default_question: "Is it red?"}
task: {name: yes_no, metrics: [contains, exact_match], max_new_tokens: 4}
train: {max_steps: 3, batch_size: 2}
adapter: {publish: testing/pets}
"""


def test_there_is_an_example_of_every_kind():
    from finetune import tables

    assert LINES.keys() == {"FAMILIES", "METRICS", "TASKS", "METHODS", "SOURCES", "EXPORT_TARGETS"}
    for table, line in LINES.items():
        ((name, _),) = [(key.value, ast.unparse(value)) for key, value in _items(line)]
        assert name not in getattr(tables, table), "an example's name must be new"
        targets = re.findall(r'"([\w.]+):(\w+)"', line)
        for module, attribute in targets:
            path = module.replace(".", "/") + ".py"
            code = FILES.get(path, "") + "".join(text for end, text in ENDS if end == path)
            assert re.search(rf"^(class|def) {attribute}\b", code, re.MULTILINE), f"{path} has no {attribute}"


def _items(line):
    parsed = ast.parse("{" + line.strip() + "}", mode="eval").body
    return zip(parsed.keys, parsed.values, strict=True)


def test_the_tree_names_what_stands_in_the_checkout():
    (tree,) = re.findall(r"^```\n(launch\.sh.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    stack, paths = [], set()
    for line in tree.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"  +", line.strip())[0]
        for name in names.split(", "):
            paths.add(Path(*stack[:indent], name))
        stack[indent:] = [names]
    assert not [path for path in paths if not (ROOT / path).exists()]
    for folder in (ROOT / "finetune", ROOT / "finetune" / "registry"):
        rooms = {path.parent.relative_to(ROOT) for path in folder.glob("*/__init__.py")}
        assert rooms <= paths, rooms - paths


def test_the_levels_are_those_that_are_tested():
    (levels,) = re.findall(r"^```\n(errors .*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert {name: level for level, line in enumerate(levels.splitlines()) for name in line.split()} == LEVELS


def test_its_commands_and_links_name_files_that_stand():
    (commands,) = re.findall(r"^\.venv/bin/python -m pytest (\S+)", TEXT, re.MULTILINE)
    links = re.findall(r"\]\(([\w/.]+)\)", TEXT)
    named = re.findall(r"`((?:tests|docs|finetune)/[\w/.]+)`", TEXT)
    new = {*FILES}
    missing = [path for path in (commands, *links, *named) if path not in new and not (ROOT / path).exists()]
    assert not missing


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Return a copy of the checkout to which the examples are applied."""
    copy = tmp_path_factory.mktemp("contributing")
    for name in ("finetune", "tests", "docs", "recipes"):
        ignored = shutil.ignore_patterns("__pycache__", "0.1.0")  # what a release left
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, copy)
    for path, code in FILES.items():
        assert not (copy / path).exists()
        (copy / path).write_text(code, encoding="utf-8")
    for path, code in ENDS:
        with (copy / path).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{code}")
    tables = (copy / "finetune" / "tables.py").read_text(encoding="utf-8")
    for table, line in LINES.items():
        tables, number = re.subn(
            rf"^({table}: .*?)^}}$", rf"\1{line}}}", tables, count=1, flags=re.MULTILINE | re.DOTALL
        )
        assert number == 1, table
    (copy / "finetune" / "tables.py").write_text(tables, encoding="utf-8")
    return copy


def run(copy, *words):
    env = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, *words], cwd=copy, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.slow
def test_the_examples_keep_the_rules(changed):
    run(changed, "-m", "ruff", "check", "finetune")
    run(changed, "-m", "ruff", "format", "--check", "finetune")
    run(changed, "-m", "finetune.cli", "schema", "docs/recipe.schema.json")
    run(changed, "-m", "finetune.cli", "schema", "--markdown", "docs/recipe.md")
    rules = (
        "tests/test_imports.py",
        "tests/test_names.py",
        "tests/recipe/test_reference.py",
        "tests/recipe/test_schema.py",
    )
    run(changed, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *rules)


@pytest.mark.slow
def test_the_examples_train_publish_answer_and_export_together(changed):
    for split, number in (("train", 4), ("val", 2), ("test", 2)):
        for label, color in (("yes", (200, 0, 0)), ("no", (0, 0, 200))):
            folder = changed / "pets" / split / label
            folder.mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (32, 32), tuple(part + i for part in color)).save(folder / f"{i}.png")
    (changed / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    *found, label, plugins = json.loads(run(changed, "-c", TRAINING).splitlines()[-1])
    head = ["lm_head.weight"]
    assert found == ["vipllava", "yes_no", "tuned_head", 8, ["contains", "exact_match"], head] and not plugins
    assert label in ("yes", "no")

"""README runs as it stands there: the demo, the app, registry and exports; its recipe trains a tiny Qwen2.5-VL."""

import json
import re

import pytest
import yaml
from PIL import Image

from finetune import demo
from finetune.cli import main
from finetune.pocket.medical import draw_phantom
from finetune.pocket.retail import draw_product
from finetune.recipe import load_recipe, refuse_incompatible
from tests.docs_code import DOCS, README, ROOT, block, run_page

RECIPE = "invoices.yaml"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The recipe of README, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / RECIPE).write_text(block(README, RECIPE), encoding="utf-8")
    return tmp_path / RECIPE


def test_the_recipe_fits_its_model(recipe):
    found = load_recipe(recipe)
    refuse_incompatible(found, source=RECIPE, model_type="qwen2_5_vl")
    assert found.model.quantization == "4bit" and found.adapter.publish == "documents/invoices"
    assert len(recipe.read_text().splitlines()) <= 12


@pytest.mark.slow
def test_the_recipe_trains_a_tiny_model_of_that_class(recipe, rows_folder, tmp_path, capsys):
    from tests.tiny import FAMILIES

    base = FAMILIES["qwen2_5_vl"](tmp_path / "base")
    few = ["train.epochs=null", "train.max_steps=2", "model.device=cpu", f"data.root={rows_folder}"]
    assert main(["train", RECIPE, f"model.name_or_path={base}", *few]) == 0
    shown = capsys.readouterr().out
    assert "quantized to 4bit" in shown and "published documents/invoices@1" in shown


def test_the_row_of_the_page_is_read_by_the_recipe(recipe, tmp_path):
    from finetune.data.splits import read_split, tally

    (row,) = re.findall(r'`(\{"image".*?\})`', (DOCS / README).read_text(encoding="utf-8").replace("\n", " "))
    image = tmp_path / "invoices" / json.loads(row)["image"]
    image.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(image)
    (tmp_path / "invoices" / "train.jsonl").write_text(row + "\n")
    found = load_recipe(recipe)
    (example,) = read_split(found.data, "train", task=found.task, seed=0, bad=tally(found.data, "train", log=print))
    assert example.answers == [yaml.safe_load(row)["answer"]]


@pytest.mark.slow
def test_readme_runs(recipe, tmp_path, capsys, monkeypatch):
    fewer = "data.rows={train: 1200, val: 100, test: 200}"  # the whole demo runs in tests/runs/test_run.py
    monkeypatch.setattr(demo, "load_recipe", lambda path, overrides=(): load_recipe(path, [*overrides, fewer]))
    Image.fromarray(draw_phantom(0, "test", 0).image).save("scan.png")
    Image.fromarray(draw_product(0, "test", 0).image).save("product.png")
    run_page(README)
    shown = capsys.readouterr().out
    assert (tmp_path / "runs/demo/demo.html").is_file()
    assert "medical/phantoms" in shown and "prod" in shown
    for folder in ("for-peft", "merged"):
        assert json.loads((tmp_path / folder / "export.json").read_text())
    assert (ROOT / "docs" / "app.png").is_file()

"""Whole runs, as a user starts them: scripts, the command, every procedural config, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.cli import main as command
from finetune.errors import RecipeError, TrainingError, TrustError
from finetune.evaluation.compare import evaluate
from finetune.recipe import load_recipe
from finetune.runs.train import train
from finetune.training.accelerator import check_launch

ROOT = Path(__file__).parents[2]
# Those of the hub's data sets are in tests/data/test_public_sets.py.
CONFIGS = [p for p in sorted((ROOT / "recipes" / "configs").rglob("*.yaml")) if "source: hub" not in p.read_text()]
PROCEDURAL = [path for path in CONFIGS if "source: procedural" in path.read_text()]
# Config -> the fields of the drawn squares, where those of its own rows have other names.
FIELDS = {"brain_mri_classes": ["data.answer=answer", "data.ignore=[question]"]}
FEW = ["data.rows={train: 16, val: 4, test: 8}", "train.epochs=null", "train.max_steps=2", "train.batch_size=4"]


def script(name, *args, **env):
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / name), *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        cwd=ROOT,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_runs(path, tmp_path, capsys, monkeypatch, tiny_fast_vlm, rows_folder):
    """Configs of real images run on a tiny base of the same class and a few drawn squares."""
    monkeypatch.setenv("FINETUNE_BASE", str(tiny_fast_vlm))
    monkeypatch.setenv("FINETUNE_DATA", "unused")
    few = FEW if path in PROCEDURAL else [*FEW[1:], f"data.root={rows_folder}", *FIELDS.get(path.stem, ())]
    recipe = load_recipe(path, [*few, f"train.output_dir={tmp_path}"])
    result = train(recipe)
    assert result.ref == f"{recipe.adapter.publish}@1"
    shown = capsys.readouterr().out
    assert shown.count("⟦") == 3 and "trainable parameters" in shown and f"published {result.ref}" in shown
    (row,) = evaluate([result.ref], [recipe])
    assert row.scores.n == result.metrics["test"].n == len(row.rows)
    assert row.scores.first.value == pytest.approx(result.metrics["test"].first.value)


def test_the_scripts_and_the_command(tmp_path):
    config = str(PROCEDURAL[0].relative_to(ROOT))
    out = script("train.py", config, *FEW, f"train.output_dir={tmp_path}")
    assert out.returncode == 0, out.stderr[-2000:]
    assert "published medical/phantoms@1" in out.stdout
    table = tmp_path / "table.json"
    out = script("evaluate.py", "base", "medical/phantoms", "--on", config, "--json", str(table), "--set", *FEW)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "95 % interval" in out.stdout
    rows = json.loads(table.read_text())["rows"]
    assert [row["adapter"] for row in rows] == ["base", "medical/phantoms"]
    assert command(["registry", "list"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none.yaml"], "error: none.yaml: the recipe cannot be read: No such file"),
        ([str(PROCEDURAL[0]), "train.epoch=1"], "train.epoch: unknown key. Did you mean 'epochs'?"),
        ([str(PROCEDURAL[0]), "model.name_or_path=pockt"], "error: no model at 'pockt'"),
    ],
)
def test_a_mistake_is_one_line(args, message):
    out = script("train.py", *args)
    assert out.returncode == 2 and message in out.stderr and "Traceback" not in out.stderr


def test_evaluate_refuses_two_bases(make_recipe):
    with pytest.raises(RecipeError, match="all recipes must name the same base, .* got 2"):
        evaluate(["base"], [make_recipe("a"), make_recipe("b")])


def test_a_bad_name_to_publish_stops_before_training(make_recipe, tiny_fast_vlm):
    from finetune.errors import AdapterReferenceError

    with pytest.raises(AdapterReferenceError, match="con"):
        train(make_recipe(tiny_fast_vlm, adapter={"publish": "testing/con"}))


def test_a_key_that_is_missing_stops_before_training(make_recipe, tmp_path, monkeypatch):
    from finetune.registry.trust.signing import SigningKey

    line = SigningKey.generate().public("release").line
    (tmp_path / "trust.yaml").write_text(f"keys: [{line}]\ndefault: {{signatures: require, keys: [release]}}\n")
    monkeypatch.setenv("FINETUNE_TRUST", str(tmp_path / "trust.yaml"))
    with pytest.raises(TrustError, match="requires signatures in the namespace 'testing', and there is no key to sign"):
        train(make_recipe("no-such-base"))


def test_the_number_of_processes_asked_for_is_checked(make_recipe, tiny_fast_vlm, monkeypatch):
    monkeypatch.setenv("FINETUNE_NUM_PROCESSES", "2")
    with pytest.raises(TrainingError, match="the launch must start 2 processes, but this run has 1"):
        train(make_recipe(tiny_fast_vlm))


def test_processes_that_are_each_a_run_of_their_own_are_refused(make_recipe, tiny_fast_vlm, monkeypatch):
    """torchrun says how many it started, whatever the user said."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = SimpleNamespace(num_processes=1)
    with pytest.raises(TrainingError, match="the launch must start 2 processes, but this run has 1"):
        check_launch(alone, make_recipe(tiny_fast_vlm))


def test_the_ask_command(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    assert command(["ask", "base", str(tmp_path / "red.png"), "What color is the background?", "--base", "pocket"]) == 0
    assert capsys.readouterr().out.strip().endswith("red")
    assert command(["ask", "base", str(tmp_path / "no.png"), "What?", "--base", "pocket"]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_holds_what_it_promises(tmp_path):
    assert command(["demo", "--output-dir", str(tmp_path), "--json", str(tmp_path / "demo.json")]) == 0
    result = json.loads((tmp_path / "demo.json").read_text())
    assert all(result["held"].values()) and len(result["rows"]) == 6
    page = (tmp_path / "demo.html").read_text()
    assert page.count("<img") == 16 and "synthetic" in page

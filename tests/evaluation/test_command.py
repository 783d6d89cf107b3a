"""``finetune evaluate``: on recipes and on new rows, as a table, as JSON and row by row."""

import json
import shutil

import pytest
import yaml

from finetune.cli import main
from finetune.preflight.use import check_reference
from finetune.runs.train import train


@pytest.fixture
def run(tiny_fast_vlm, make_recipe):
    recipe = make_recipe(tiny_fast_vlm)
    return recipe, train(recipe)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_recipes_new_rows_and_every_row(run, rows_folder, tmp_path, capsys, monkeypatch):
    recipe, result = run
    checked = []
    monkeypatch.setattr(
        "finetune.preflight.run.check_reference",
        lambda ref, *args: checked.append(ref) or check_reference(ref, *args),
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    scores, rows = tmp_path / "out" / "scores.json", tmp_path / "out" / "rows.jsonl"
    words = ["evaluate", "base", str(result.adapter), "--on", str(config)]
    assert main([*words, "--json", str(scores), "--rows", str(rows)]) == 0
    assert "exact match" in capsys.readouterr().out
    assert checked == [str(result.adapter)], "it is checked once"
    found = json.loads(scores.read_text())["rows"]
    assert [one["adapter"] for one in found] == ["base", str(result.adapter)]
    # What the run measured is what the command measures.
    assert [one["scores"] for one in found] == [
        json.loads((recipe.run_folder / f"scores-{who}.json").read_text()) for who in ("base", "adapter")
    ]
    kept = lines_of(recipe.run_folder / "predictions-adapter.jsonl")
    own = [line for line in lines_of(rows) if line["adapter"] == str(result.adapter)]
    assert [{key: line[key] for key in kept[0]} for line in own] == kept

    test = lines_of(rows_folder / "test.jsonl")[:3]
    data = tmp_path / "new" / "New rows.jsonl"
    shutil.copytree(rows_folder, data.parent)
    data.write_text("".join(json.dumps(row) + "\n" for row in test), encoding="utf-8")
    assert main(["evaluate", str(result.adapter), "base", "--data", str(data), "--rows", str(rows)]) == 0
    new = lines_of(rows)
    assert [(line["adapter"], line["config"]) for line in new] == [
        (who, "new-rows") for who in (str(result.adapter), "base") for _ in test
    ]
    assert [line["references"] for line in new[:3]] == [[row["answer"]] for row in test]
    assert [line["question"] for line in new[:3]] == [row["question"] for row in test]
    assert new[0]["images"] == [str(data.parent / test[0]["image"])]
    assert [line["prediction"] for line in new[:3]] == [line["prediction"] for line in own[:3]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base"], "evaluate needs rows, got neither --on nor --data"),
        (["base", "--data", "x.jsonl"], "it needs a base model, got none. Give --base BASE"),
        (["base", "--data", "x.csv", "--base", "pocket"], "x.csv: the name of the file must end in one of .jsonl"),
        (["base", "--on", "a.yaml", "--base", "pocket"], "--base cannot be used with --on"),
        (["base", "--data", "x.jsonl", "--set", "seed=1"], "--set needs a CONFIG to change, got none"),
        (
            ["base", "--data", "no.jsonl", "--base", "pocket"],
            "--data no.jsonl: the file must exist, and does not. Check",
        ),
        (["base", "--data", "tset.jsonl", "--base", "pocket"], "and does not. Did you mean 'test.jsonl'?"),
        (["no/adapter", "--data", "x.jsonl"], "no adapter 'no/adapter'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test.jsonl").touch()
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err

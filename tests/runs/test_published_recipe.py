"""The recipe in a manifest: what was set is there, what is of one machine or secret is not."""

import json

import pytest

from finetune.adapters.folder import read_folder
from finetune.cli import main
from finetune.recipe import parse_recipe
from finetune.recipe.published import published_recipe
from finetune.registry import AdapterRegistry
from finetune.registry.differences import differences
from finetune.runs.train import train

RAW = {
    "name": "brain",
    "domain": "medical",
    "model": {"name_or_path": "org/model", "revision": "0123456789abcdef0123456789abcdef01234567"},
    "method": {"name": "lora"},
    "data": {"source": "jsonl", "root": "somewhere/relative"},
    "train": {"epochs": 2, "output_dir": "out"},
}


def published(tmp_path, **changes):
    raw = {key: {**part, **changes.get(key, {})} if isinstance(part, dict) else part for key, part in RAW.items()}
    recipe = parse_recipe(raw | {k: v for k, v in changes.items() if k not in raw}, source="test")
    return published_recipe(recipe)


def test_what_was_set_is_there(tmp_path):
    recipe = published(tmp_path, task={"question_template": "/short {question}"})
    assert recipe["model"] == {
        "name_or_path": "org/model", "revision": RAW["model"]["revision"], "dtype": "float32", "device": "auto",
        "quantization": None, "attn_implementation": "auto",
    }  # fmt: skip
    assert recipe["train"]["epochs"] == 2 and recipe["method"][0]["r"] == 16
    assert recipe["task"]["question_template"] == "/short {question}"
    assert recipe["data"]["train"] == "train.jsonl"
    assert "output_dir" not in recipe["train"] and "root" not in recipe["data"]


@pytest.mark.parametrize(
    "value",
    [
        "/home/me/rows.jsonl", "~/rows.jsonl", "../rows.jsonl", "a/../../rows.jsonl", "C:\\rows.jsonl", "file:///rows",
        "https://me:pass@host/rows.jsonl", "https://token@host/rows", "https://host/rows.jsonl?X-Amz-Signature=1a2b",
        "hf_abcdefghijklmnop", "sk-abcdefghijklmnop", "ghp_abcdefghijklmnop", "AKIAIOSFODNN7EXAMPLE",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "-----BEGIN PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_local_paths_and_secrets_are_not(tmp_path, value):
    recipe = published(tmp_path, data={"val": value}, adapter={"intended_use": value})
    assert "val" not in recipe["data"] and "intended_use" not in recipe["adapter"]
    assert value not in json.dumps(recipe)


def test_what_came_from_the_environment_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("WHO", "somebody")
    recipe = published(tmp_path, model={"name_or_path": "${WHO}/model"}, data={"val": "${WHO}.jsonl"})
    assert "somebody" not in json.dumps(recipe) and recipe["model"]["revision"] and recipe["data"]["train"]


def test_a_folder_is_not_a_base_to_name(tmp_path):
    (tmp_path / "base").mkdir()
    recipe = published(tmp_path, model={"name_or_path": str(tmp_path / "base")})
    assert "name_or_path" not in recipe["model"]


def test_a_run_keeps_it_and_diff_shows_what_was_set(make_recipe, tiny_fast_vlm, tmp_path, capsys):
    rates = (1e-3, 3e-3)
    results = [
        train(make_recipe(tiny_fast_vlm, name=f"run-{i}", train={"learning_rate": rate}, method={"r": 4 + i}))
        for i, rate in enumerate(rates)
    ]
    for result, rate in zip(results, rates, strict=True):
        text = (result.adapter / "manifest.json").read_text()
        assert str(tmp_path) not in text and str(tiny_fast_vlm) not in text
        kept = read_folder(result.adapter).manifest.training.recipe
        assert kept["train"]["learning_rate"] == rate and kept["task"]["max_new_tokens"] == 4
    registry = AdapterRegistry()
    a, b = (registry.resolve(result.ref) for result in results)
    found = {d.path: (d.a, d.b) for d in differences(registry, a, b) if d.path.startswith("recipe")}
    assert found == {
        "recipe.name": ("run-0", "run-1"),
        "recipe.method.lora.r": (4, 5),
        "recipe.train.learning_rate": rates,
    }
    assert "training.recipe_digest" not in {d.path for d in differences(registry, a, b)}
    capsys.readouterr()
    assert main(["registry", "diff", a.ref, b.ref]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "learning_rate" in line]
    assert line.split()[:3] == ["recipe.train.learning_rate", "0.001", "0.003"]

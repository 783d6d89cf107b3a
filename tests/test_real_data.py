"""The main job on real images and a real small base, where they lie at hand."""

import os
from pathlib import Path

import pytest

from finetune.evaluation.compare import evaluate
from finetune.recipe import load_recipe
from finetune.runs.train import train
from finetune.serving.loading import load

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(
        not (os.environ.get("FINETUNE_BASE") and os.environ.get("FINETUNE_DATA")),
        reason="set FINETUNE_BASE to a base model and FINETUNE_DATA to the folder of the real images",
    ),
]


def test_two_domains_on_one_base(tmp_path):
    """A few hundred rows of each: enough to beat the base and the grey image by far, not to reach the table."""
    settings = {
        "medical/brain_mri.yaml": [
            "data.max_rows={train: 300, val: 40, test: 100}",
            "train.epochs=4",
            "train.batch_size=8",
        ],
        "retail/clothing.yaml": [
            "data.max_rows={train: 300, val: 40, test: 100}",
            "train.epochs=4",
            "train.batch_size=8",
        ],
    }
    recipes = [load_recipe(CONFIGS / n, [*o, f"train.output_dir={tmp_path}"]) for n, o in settings.items()]
    refs = [train(recipe).ref for recipe in recipes]
    for ref, recipe in zip(refs, recipes, strict=True):
        found = {one.adapter: one.scores for one in evaluate(["base", ref], [recipe])}
        own, base = found[ref], found["base"]
        assert own.first.value >= base.first.value + 0.15
        assert own.first.interval[0] > own.baselines["blank_image"]["exact_match"].value
    vlm = load(refs[0])
    assert vlm.adapter.probe.verdict == "passed"
    before = vlm.base.probe(0)
    with vlm.using(refs[1]):
        pass
    assert (vlm.base.probe(0) == before).all()

"""A tuned prompt of 16 tokens teaches the pocket model something of both synthetic domains."""

import pytest

from finetune.recipe import parse_recipe
from finetune.runs.train import train


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["medical", "retail"])
def test_a_prompt_alone_gains_on_a_domain_that_the_base_never_saw(domain, tmp_path):
    recipe = parse_recipe(
        {
            "name": "prompt",
            "domain": domain,
            "model": {"name_or_path": "pocket", "device": "cpu"},
            "method": {
                "name": "prompt_tuning",
                "prompt_tuning_init_text": "What is it? Which color? Where is it? How many?",
            },
            "data": {"source": "procedural", "name": domain, "rows": {"train": 2400, "test": 400}},
            "train": {"epochs": 2, "batch_size": 32, "learning_rate": 0.1, "output_dir": str(tmp_path)},
        },
        source="test",
    )
    result = train(recipe)
    assert result.metrics["test"].first.value >= result.metrics["base"].first.value + 0.08

"""A dual encoder from its images to an app: trained, published, loaded again, and refused where it is damaged."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.adapters.folder import read_folder
from finetune.adapters.manifest import CONFIG_NAME, MANIFEST_NAME
from finetune.assemble.loading import base_of, load_base
from finetune.errors import BaseMismatchError, DataError, ManifestError, ModelError, ProbeError, RecipeError
from finetune.evaluation.compare import evaluate
from finetune.methods.adapter import attach
from finetune.metrics.names import named_values
from finetune.runs.train import train
from finetune.serving.loading import load
from tests.serving.test_app import resave, same, state, zero_b

TEMPLATE = "a photo of {label}"
LABELS = ("a red square", "a blue square")


def square(color: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 60, (40, 32, 3), dtype=np.uint8)
    pixels[..., 2 * color] += 180
    return pixels


@pytest.fixture
def pairs_folder(tmp_path):
    """Images and captions, no question."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, count in (("train", 16), ("test", 8)):
        rows = []
        for i in range(count):
            Image.fromarray(square(i % 2, seed=i + count)).save(folder / f"{split}{i}.png")
            rows.append(json.dumps({"image": f"{split}{i}.png", "caption": LABELS[i % 2]}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def recipe(make_recipe, tiny_clip, pairs_folder):
    return make_recipe(
        tiny_clip,
        data={"root": str(pairs_folder), "answer": "caption", "val": None},
        task={"name": "contrastive", "text_template": TEMPLATE},
        method={"towers": {"language": "all-linear", "vision": "all-linear"}},
        train={"max_steps": 8, "batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 3e-3},
    )


def test_train_publish_classify_and_refuse(recipe, tiny_clip, tmp_path, capsys):
    run = train(recipe)
    named = named_values({who: scores.to_json() for who, scores in run.metrics.items()})
    assert named["base.exact_match"] < 0.8 and named["test.exact_match"] == 1.0
    assert named["test.majority.exact_match"] == 0.5
    assert named["test.blank_image.exact_match"] == 0.5, "a grey image has one label, right for half the rows"
    shown = capsys.readouterr().out
    assert "⟦a photo of a red square⟧" in shown and "published testing/squares@1" in shown

    vlm = load("testing/squares", base=str(tiny_clip), device="cpu")
    assert vlm.adapter.probe.verdict == "passed"
    assert [vlm.classify(square(i), LABELS) for i in (0, 1)] == list(LABELS)
    images = torch.stack([vlm.embed(square(i, seed=5)) for i in (0, 1)])
    texts = torch.stack([vlm.embed_text(TEMPLATE.replace("{label}", label)) for label in LABELS])
    assert torch.allclose(images.norm(dim=-1), torch.ones(2))
    assert (images @ texts.T).argmax(dim=1).tolist() == [0, 1], "each image lies closest to its own text"
    (row,) = evaluate([run.ref], [recipe])
    assert row.scores.first.value == 1.0 and row.scores.n == 8
    assert all(row.right and abs(sum(row.prediction.scores.values()) - 1) < 1e-5 for row in row.rows)
    with pytest.raises(
        ModelError, match=r"ask\(image, question\) does not support task contrastive on a clip base. Use classify"
    ):
        vlm.ask(square(0), "What color is it?")
    with pytest.raises(DataError, match="must be a list of at least one text, got 'red'"):
        vlm.classify(square(0), "red")
    with pytest.raises(DataError, match="at most 64 tokens for this base, got 248 in .* A text is never cut"):
        vlm.embed_text("red " * 82)
    damages(run, vlm, tmp_path)


def a_question(folder, tensors, config, manifest):
    task = {"name": "vqa", "question_template": "{question}", "max_new_tokens": 4, "answer_normalization": "vqa"}
    resave(folder, tensors, config, manifest, task=task)


def a_prompt(folder, tensors, config, manifest):
    part = {"method": "prompt_tuning", "modules": {},
            "options": {"num_virtual_tokens": 2, "token_dim": 64, "placeholder_token_id": 1}}  # fmt: skip
    parts = [part.model_dump() for part in manifest.adapter.parts]
    description = manifest.adapter.model_copy(update={"peft_type": "FINETUNE_VLM"})
    config = {
        "peft_type": "FINETUNE_VLM",
        "parts": [{"method": p["method"], **p["options"]} for p in [*parts, part]],
        "how_to_load": "finetune.load(...), of the package finetune-vlm",
    }
    resave(folder, tensors, config, manifest, adapter={**description.model_dump(), "parts": [*parts, part]})


def other_tokenizer(folder, tensors, config, manifest):
    resave(folder, tensors, config, manifest, processor__tokenizer="0" * 64)


def fewer_rows(folder, tensors, config, manifest):
    probe = manifest.probe.model_dump()
    resave(
        folder, tensors, config, manifest, probe={**probe, "base": probe["base"] * 2, "adapter": probe["adapter"] * 2}
    )


REFUSALS = [
    (zero_b, ProbeError, "its effect on the probe is 0, the recorded effect is"),
    (a_question, ManifestError, "the task must fit the architecture of the base: task vqa cannot be used with clip"),
    (a_prompt, ManifestError, "a model with one input embedding for all tokens, and CLIPModel has none"),
    (other_tokenizer, BaseMismatchError, "trained with another tokenizer"),
    (fewer_rows, ProbeError, r"must have the shape \[2, 32\] of this model's outputs, got \[4, 32\]"),
]


def damages(run, vlm, tmp_path):
    """Each damage is refused, and leaves base and adapter as they were."""
    before, answers = state(vlm.model), vlm.base.probe(0)
    good, config = read_folder(run.adapter), json.loads((run.adapter / CONFIG_NAME).read_bytes())
    for number, (change, error, message) in enumerate(REFUSALS):
        folder = tmp_path / f"{number}"
        shutil.copytree(run.adapter, folder)
        change(folder, dict(good.tensors), dict(config), good.manifest)
        with pytest.raises(error, match=message):
            vlm.add(folder)
        assert same(before, state(vlm.model)) and torch.equal(vlm.base.probe(0), answers), change.__name__
    raw = json.loads((run.adapter / MANIFEST_NAME).read_bytes())
    raw["task"]["text_template"] = "a photo"
    shutil.copytree(run.adapter, tmp_path / "template")
    (tmp_path / "template" / MANIFEST_NAME).write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match=r"text_template: .*must hold \{label\} exactly once"):
        vlm.add(tmp_path / "template")


def test_the_temperature_stays_frozen_and_peft_opens_the_folder(recipe, tiny_clip):
    from peft import PeftModel

    from finetune.runs.saving import save_weights

    base = load_base(str(tiny_clip), device="cpu")
    attachment = attach(base.host, recipe.method)
    assert not base.model.logit_scale.requires_grad
    assert {name for name, p in base.model.named_parameters() if p.requires_grad} == {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight") for name in attachment.parameters
    }
    with torch.no_grad():
        for parameter in attachment.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = recipe.run_folder / "weights"
    save_weights(folder, attachment, attachment.parameters, model_type="clip")
    plain = load_base(str(tiny_clip), device="cpu")
    assert not torch.allclose(plain.probe(0), base.probe(0), atol=1e-3)
    PeftModel.from_pretrained(plain.model, folder)
    assert torch.allclose(plain.probe(0), base.probe(0), atol=1e-6)


def test_a_base_that_writes_text_does_not_classify(tiny_fast_vlm):
    vlm = load("base", base=str(tiny_fast_vlm), device="cpu")
    with pytest.raises(ModelError, match="does not support task vqa on a fast_vlm base. Use ask"):
        vlm.classify(square(0), LABELS)
    with pytest.raises(ModelError, match=r"embed\(image\) does not support task vqa on a fast_vlm base"):
        vlm.embed(square(0))


def test_what_was_not_known_when_the_recipe_was_read_is_refused_before_the_base_is_loaded(make_recipe, tiny_clip):
    """As for a hub id whose config was not on this machine."""
    unknown = make_recipe("somewhere/else")
    recipe = unknown.model_copy(update={"model": unknown.model.model_copy(update={"name_or_path": str(tiny_clip)})})
    with pytest.raises(RecipeError, match="squares: task vqa cannot be used with clip"):
        base_of(recipe)
    with pytest.raises(ModelError, match="task vqa cannot be used with clip"):
        load_base(str(tiny_clip), device="cpu").task(recipe.task)


def test_a_base_in_half_precision_learns_too(recipe, tiny_clip):
    half = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    run = train(half)
    assert run.metrics["test"].first.value > run.metrics["base"].first.value
    assert load(run.adapter, base=str(tiny_clip), device="cpu", dtype="bfloat16").adapter.probe.verdict == "passed"

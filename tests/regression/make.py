"""Make the net of a release: tiny bases, adapters, batches with what comes of them, a registry and recipes.

python -m tests.regression.make FOLDER

It is run once for a release, on the code of that release, and never again: see README.md beside this file.
"""

import argparse
import json
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import finetune
from finetune.adapters.manifest import sha256_hex
from finetune.assemble.loading import load_base
from finetune.evaluation.scores import Scores, Value
from finetune.methods.adapter import attach, detach
from finetune.registry import AdapterRegistry, promote
from finetune.registry.trust.signing import SigningKey
from finetune.runs.saving import probe_effect, save_adapter
from tests.matrix import METHODS, STEPS, extended, logits, losses, recipe_of, rows
from tests.regression.bases import WEIGHTS, build_base, store_base
from tests.regression.outputs import RECIPES, outputs, sample, train
from tests.tiny import FAMILIES

ROOT = Path(__file__).parents[2]
ALL_METHODS_ON = "qwen2_5_vl"
COLORS = {"red": (210, 40, 40), "blue": (40, 40, 210), "green": (40, 210, 40)}
LEAST_EFFECT = 0.1  # of an adapter, relative to the largest output: well above what another CPU's rounding makes

_TASK = "{name: vqa, answer_normalization: vqa, max_new_tokens: 4}"
_MODELS = {"lora": "idefics3", "prompt": ALL_METHODS_ON, "contrastive": "clip"}
_METHODS = {
    "lora": "{name: lora, r: 4, lora_alpha: 16, towers: {language: all-linear, projector: all-linear, vision: none}}",
    "prompt": "\n  - {name: prompt_tuning, num_virtual_tokens: 4, prompt_tuning_init_text: What color}"
    "\n  - {name: overrides, parameters: [projector, norms]}",
    "contrastive": "{name: lora, r: 4, lora_alpha: 8, "
    "towers: {language: all-linear, projector: none, vision: all-linear}}",
}
_TASKS = {
    "lora": _TASK,
    "prompt": _TASK,
    "contrastive": "{name: contrastive, text_template: 'a {label} thing', answer_normalization: vqa}",
}
_RATES = {"lora": 0.01, "prompt": 0.03, "contrastive": 0.003}
_STEPS = {"lora": 12, "prompt": 20, "contrastive": 12}
_PART = Scores(
    values={"exact_match": Value(value=0.75, interval=(0.5, 1.0), n=4, unit=None, higher_is_better=True)},
    baselines={
        of: {"exact_match": Value(value=value, interval=None, n=4, unit=None, higher_is_better=True)}
        for of, value in (("majority", 0.5), ("blank_image", 0.25))
    },
    n=4,
    truncated=0,
)
_SCORES = replace(_PART, by_question_type={"color": _PART})
# Every setting whose default could change is written out, and no split chooses among checkpoints.
_RECIPE = """# {steps} steps of {name} on the tiny {family}; what they gave is in outputs.json.
name: {name}
domain: regression
seed: 0
model: {{name_or_path: given by the test, device: cpu, dtype: float32}}
method: {method}
data: {{source: jsonl, root: given by the test, val: null}}
task: {task}
train:
  max_steps: {steps}
  batch_size: 4
  gradient_accumulation_steps: 1
  optim: adamw_torch
  learning_rate: {rate}
  lr_scheduler_type: cosine
  warmup_ratio: 0.1
  weight_decay: 0.0
  max_grad_norm: 1.0
  eval_batch_size: 8
  logging_steps: 1
  group_by_length: false
  num_workers: 0
  feature_store: off
"""


def make_net(net: Path) -> None:
    """Write the whole net of the code as it is into ``net``."""
    net.mkdir(parents=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for family, save in FAMILIES.items():
            store_base(save(work / "saved" / family), net / "bases" / family)
            build_base(net / "bases" / family, work / "bases" / family)
        wanted = {f"{_slug(family)}-lora": (family, "lora") for family in FAMILIES}
        wanted |= {f"method-{_slug(method)}": (ALL_METHODS_ON, method) for method in METHODS}
        del wanted["method-lora"]
        stored = {}
        for name, (family, method) in wanted.items():
            _make_adapter(work / "bases" / family, METHODS[method], net / "adapters" / name, net / "batches")
        contents = {
            "commit": subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip(),
            "adapters": {name: family for name, (family, _) in wanted.items()},
            "registry": _make_registry(work, net),
            "recipes": _MODELS,
            "weights": {family: sha256_hex((work / "bases" / family / WEIGHTS).read_bytes()) for family in FAMILIES},
        }
        (net / "net.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        for name, family in contents["adapters"].items():
            stored |= _checked(name, net / "adapters" / name, family, work, net)
        for ref, family in contents["registry"].items():
            stored |= _checked(ref, ref, family, work, net)
        np.savez_compressed(net / "outputs.npz", **stored)
        _make_recipes(net, work)


def _slug(text: str) -> str:
    return text.replace("_", "-").replace("+", "-plus-").strip("-")  # as names of adapters are written


def _make_adapter(
    base_folder: Path, method: object, folder: Path, batches: Path, *, seed: int = 0, scores: Scores | None = None
):
    """Train an adapter for some steps and save it; store the batch of its family where there is none."""
    torch.manual_seed(seed)
    recipe = recipe_of(method, base_folder, folder).model_copy(update={"name": folder.name, "domain": "regression"})
    base = load_base(str(base_folder), device="cpu")
    batch_file = batches / f"{base.family.model_type}.npz"
    if not batch_file.exists():
        batches.mkdir(exist_ok=True)
        # Of a dual encoder also the texts; of others the rows up to the answer, so that they end at the right.
        dual = base.family.architecture == "dual_encoder"
        inputs = (base.collator.training_batch if dual else base.collator.prompt_batch)(rows(2)).inputs
        np.savez_compressed(batch_file, **{name: tensor.numpy() for name, tensor in inputs.items()})
    batch = base.collator.training_batch(rows())
    attachment = attach(base.host, recipe.method)
    losses(base, attachment, extended(attachment, batch), lr=0.02)
    attachment.freeze()
    splits = {"train": rows()}
    probe = probe_effect(base, attachment)
    save_adapter(
        folder,
        recipe,
        base,
        attachment,
        splits,
        {"test": scores, "base": scores} if scores else {},
        probe=probe,
        steps=STEPS,
    )
    assert logits(base, extended(attachment, batch)).isfinite().all()
    detach(base.model)


def _make_registry(work: Path, net: Path) -> dict[str, str]:
    """Write a registry with versions, aliases, a promotion, a rollback, a yank and signatures.

    Returns:
        The references that a test asks for, each with the family of its base.
    """
    registry = AdapterRegistry(net / "registry")
    for number, method in enumerate(("lora", "lora+prompt+projector", "dora"), start=1):
        folder = work / f"v{number}" / "colors"
        _make_adapter(
            work / "bases" / ALL_METHODS_ON, METHODS[method], folder, net / "batches", seed=number, scores=_SCORES
        )
        registry.publish(folder, aliases=["staging"] if number < 3 else [])
    promote(registry, "regression/colors@1", "prod", require=["test.exact_match>=0.5"])
    registry.alias("regression/colors", "prod", 2)
    registry.rollback("regression/colors", "prod")
    registry.yank("regression/colors@3", reason="worse on blue")
    folder = work / "signed" / "matching"
    _make_adapter(work / "bases" / "clip", METHODS["lora"], folder, net / "batches", seed=4, scores=_SCORES)
    key = SigningKey.generate()  # discarded: it cannot sign again
    AdapterRegistry(net / "registry", signer=key).publish(folder, aliases=["prod"])
    (net / "trust.yaml").write_text(
        f"keys:\n  - {key.public('release').line}\nnamespaces:\n  regression: {{signatures: warn, keys: [release]}}\n",
        encoding="utf-8",
    )
    colors = ("1", "2", "3", "prod", "staging", "latest")
    return {f"regression/colors@{which}": ALL_METHODS_ON for which in colors} | {"regression/matching@prod": "clip"}


def _checked(name: str, ref: str | Path, family: str, work: Path, net: Path) -> dict[str, np.ndarray]:
    """Return the stored outputs of an adapter, after making sure that they would show a change."""
    where = {"base": work / "bases" / family, "batch": net / "batches" / f"{family}.npz"}
    plain, adapted = map(sample, outputs(ref, registry=net / "registry", **where))
    effect = np.abs(adapted - plain).max() / np.abs(plain).max()
    print(f"{name}: effect {effect:.2f}, largest {np.abs(plain).max():.2f}")
    assert effect > LEAST_EFFECT, f"{name} changes the outputs by {effect:.2g} of the largest only"
    return {f"{name}: base": plain, f"{name}: adapter": adapted}


def _make_recipes(net: Path, work: Path) -> None:
    """Write the recipes, their rows and images, and what they give."""
    data = net / "recipes" / "data"
    (data / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(24):
        color = list(COLORS)[i % 3]
        # As large as the bases take them, so that no resizing can change them.
        pixels = np.array(COLORS[color], np.uint8) + rng.integers(0, 40, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / "images" / f"{i}.png", optimize=True)
        lines.append({"image": f"images/{i}.png", "question": "What color is it?", "answer": color})
    for split, chosen in (("train", lines[:15]), ("test", lines[15:])):
        text = "".join(json.dumps(line) + "\n" for line in chosen)
        (data / f"{split}.jsonl").write_text(text, encoding="utf-8")
    found = {}
    for name in RECIPES:
        settings = {"method": _METHODS, "task": _TASKS, "rate": _RATES, "steps": _STEPS, "family": _MODELS}
        text = _RECIPE.format(name=name, **{key: table[name] for key, table in settings.items()})
        (net / "recipes" / f"{name}.yaml").write_text(text, encoding="utf-8")
        found[name] = train(name, net=net, bases=work / "bases", work=work / "runs")
        del found[name]["folder"]
    (net / "recipes" / "outputs.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the new net, such as tests/regression/0.1.0")
    folder = parser.parse_args().folder
    if folder.exists():
        raise SystemExit(f"{folder} is there already; what a release wrote is never made again")
    make_net(folder)
    print(f"{folder}: made by finetune at {finetune.__file__}")


if __name__ == "__main__":
    main()

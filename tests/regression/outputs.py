"""What a checkout computes of a stored net: logits of its bases and adapters, and all that its recipes give.

python outputs.py NET BASES WORK OUT [--only NAME ...] [--recipes]

It is also run as a file, on the package of another checkout. So it imports nothing of the tests, and of the package
only what an app does.
"""

import argparse
import json
from pathlib import Path

import numpy as np

RECIPES = ("lora", "prompt", "contrastive")
POSITIONS, EVERY = 6, 4  # of logits [B, T, V] are stored the last positions, and of the vocabulary each fourth id


def adapters_of(net: Path) -> dict[str, str]:
    """Return the names of the stored adapters, each with the family of its base."""
    return json.loads((net / "net.json").read_text(encoding="utf-8"))["adapters"]


def versions_of(net: Path) -> dict[str, str]:
    """Return the references into the stored registry, each with the family of its base."""
    return json.loads((net / "net.json").read_text(encoding="utf-8"))["registry"]


def outputs(ref: str | Path, *, base: Path, batch: Path, registry: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return what a base and an adapter on it make of a stored batch.

    Args:
        ref: the adapter's folder, or a reference into ``registry``.
        base: the folder of its base.
        batch: the inputs, as numpy saved them.
        registry: the folder of a registry.

    Returns:
        Twice fp32 logits [B, T, V], or embeddings [B, 2, D] of image and text.
    """
    import finetune

    vlm = finetune.load(ref, base=str(base), device="cpu", registry=registry)
    with vlm.using(None):
        plain = forward(vlm, batch)
    return plain, forward(vlm, batch)


def forward(vlm, batch: Path) -> np.ndarray:
    """Return what a model, with the adapter that is active, makes of a stored batch; shapes as in ``outputs``."""
    import torch

    from finetune.core.batch import Batch

    with np.load(batch) as arrays:
        inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if vlm.adapter and vlm.adapter.placeholders:
        inputs = vlm.adapter.placeholders.insert(Batch(inputs, [])).inputs
    with torch.inference_mode():
        out = vlm.model(**inputs)
        logits = getattr(out, "logits", None)
        found = torch.stack([out.image_embeds, out.text_embeds], dim=1) if logits is None else logits
    return found.float().numpy()


def sample(outputs: np.ndarray) -> np.ndarray:
    """Return what is stored of ``outputs``: of logits the last positions, which see all before; all of embeddings."""
    return outputs[:, -POSITIONS:, ::EVERY] if outputs.shape[1] > 2 else outputs


def train(name: str, *, net: Path, bases: Path, work: Path) -> dict[str, object]:
    """Run a stored recipe.

    Returns:
        ``losses``, one a step; ``before`` and ``after``, the scores; ``base`` and ``adapter``, one prediction a row;
        and ``folder``, of the finished adapter.
    """
    import finetune

    overrides = [f"data.root={net / 'recipes' / 'data'}", f"train.output_dir={work}"]
    file = net / "recipes" / f"{name}.yaml"
    family = json.loads((net / "net.json").read_text(encoding="utf-8"))["recipes"][name]
    recipe = finetune.load_recipe(file, [f"model.name_or_path={bases / family}", *overrides])
    result = finetune.train(recipe)
    base, adapter = finetune.evaluate(["base", str(result.adapter)], [recipe])
    lines = [json.loads(line) for line in (result.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "before": result.metrics["base"].first.value,
        "after": result.metrics["test"].first.value,
        "base": list(map(str, base.predictions)),
        "adapter": list(map(str, adapter.predictions)),
        "folder": result.adapter,
    }


def everything(net: Path, bases: Path, work: Path, *, only: list[str], recipes: bool) -> dict[str, np.ndarray]:
    """Return all that the net's adapters and recipes give, by name."""
    from safetensors.numpy import load_file

    found = {}
    for name, family in adapters_of(net).items():
        if only and name not in only:
            continue
        where = {"base": bases / family, "batch": net / "batches" / f"{family}.npz"}
        found[f"{name}: base"], found[f"{name}: adapter"] = outputs(net / "adapters" / name, **where)
    for name in RECIPES if recipes else ():
        result = train(name, net=net, bases=bases, work=work)
        folder = result.pop("folder")
        found |= {f"recipe {name}: {what}": np.array(value) for what, value in result.items()}
        for tensor, value in load_file(folder / "adapter_model.safetensors").items():
            found[f"recipe {name}: weights {tensor}"] = value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("net", "bases", "work", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--recipes", action="store_true")
    args = parser.parse_args()
    import finetune

    if (used := Path(finetune.__file__).resolve().parents[1]) != Path.cwd().resolve():
        raise SystemExit(f"the package must be that of {Path.cwd()}, but python imports that of {used}")
    found = everything(args.net, args.bases, args.work, only=args.only, recipes=args.recipes)
    np.savez(args.out, **found)


if __name__ == "__main__":
    main()

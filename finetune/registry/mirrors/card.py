"""The model card of an adapter: what the Hugging Face Hub shows of it, made from its manifest."""

from typing import Any

from finetune.adapters.manifest import AdapterManifest, VqaContract
from finetune.adapters.peft_format import OURS
from finetune.registry.versions import Version

# Of the hub's list, those that adapters are commonly under; any other is called "other", by its name.
_LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-sa-4.0", "cc0-1.0", "gemma", "gpl-3.0", "lgpl-3.0", "llama3.2", "mit", "mpl-2.0", "openrail", "unlicense",
}  # fmt: skip
_NOT_SCORES = {"n"}


def model_card(version: Version, manifest: AdapterManifest) -> str:
    """Returns the card: front matter that the hub reads, and a page for people.

    Args:
        version: the version that is shown.
        manifest: its manifest.
    """
    return f"---\n{_front_matter(version, manifest)}\n---\n\n{_page(version, manifest)}"


def _front_matter(version: Version, manifest: AdapterManifest) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = "image-text-to-text" if isinstance(manifest.prompt, VqaContract) else "zero-shot-image-classification"
    scores = [
        EvalResult(
            task_type=task,
            dataset_type=manifest.training.domain,
            dataset_name=f"{manifest.full_name}, test split",
            metric_type=name,
            metric_value=value,
        )
        for name, value in _scores(manifest, "after").items()
    ]
    license = (manifest.license or "").lower()
    fields: dict[str, Any] = {
        "base_model": manifest.base.hub_id,
        "base_model_relation": "adapter",
        # PEFT refuses the others by name, so the hub must not tell to open them with it.
        "library_name": None if manifest.adapter.peft_type == OURS else "peft",
        "pipeline_tag": task,
        "tags": [
            "finetune-vlm",
            *(part.method for part in manifest.adapter.parts),
            manifest.training.domain,
            *(["synthetic"] if manifest.synthetic else []),
        ],
        "license": license if license in _LICENSES else "other" if license else None,
        "license_name": manifest.license if license and license not in _LICENSES else None,
        "model_name": version.full_name,
        "eval_results": scores or None,
    }
    return str(ModelCardData(**fields).to_yaml(line_break="\n")).rstrip("\n")


def _scores(manifest: AdapterManifest, when: str) -> dict[str, float]:
    scores = manifest.summary()["metrics"].get(when, {})
    return {k: v for k, v in scores.items() if not isinstance(v, bool) and k not in _NOT_SCORES}


def _page(version: Version, manifest: AdapterManifest) -> str:
    base, record = manifest.base, manifest.training
    where = f"`{base.hub_id}`" + (f" at `{base.revision}`" if base.revision else "") if base.hub_id else "a local base"
    rows = ", ".join(f"{split} {number}" for split, number in record.rows.items())
    lines = [
        f"# {version.full_name}, version {version.version}",
        "",
        f"An adapter ({manifest.adapter.methods}) for {where} (`{base.model_type}`), of {record.domain}, task "
        f"{record.task}. It fits that base only: weights and config with the digest `{base.digest}`.",
        *(["", "**Trained on pictures that were drawn by a program.**"] if manifest.synthetic else []),
        "",
        "```python",
        "import finetune",
        "",
        'vlm = finetune.load("FOLDER", base="BASE")  # this folder, downloaded; the base',
        "```",
        "",
        "That way it is checked first: every digest, the base, and its effect on a probe."
        + ("" if manifest.adapter.peft_type == OURS else " PEFT opens the folder too, without these checks."),
        "",
        *_table(manifest),
        f"Trained {record.steps} steps with seed {record.seed}; rows: {rows or 'not told'}. "
        f"Recipe `{record.recipe[:16]}`.",
        "",
        f"Intended use: {' '.join((manifest.intended_use or 'not stated').split())}",
        "",
        f"Licence: {manifest.license or 'not stated'}. Manifest: `sha256:{version.digest}`.",
    ]
    return "\n".join(lines) + "\n"


def _table(manifest: AdapterManifest) -> list[str]:
    before, after = _scores(manifest, "before"), _scores(manifest, "after")
    if not (before or after):
        return []
    rows = [
        f"| {name} | {_number(before.get(name))} | {_number(after.get(name))} |"
        for name in dict.fromkeys([*before, *after])
    ]
    return ["| test split | base alone | with the adapter |", "|---|---|---|", *rows, ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

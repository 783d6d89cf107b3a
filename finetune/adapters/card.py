"""The model card of an adapter, or of what was made of one: what the Hugging Face Hub shows, from its manifest."""

from dataclasses import dataclass
from typing import Any, Literal

from finetune.adapters.manifest import AdapterManifest, VqaContract
from finetune.outside_text import markdown, markdown_block, markdown_cell, markdown_code, safe_block

CARD_NAME = "README.md"
# Of the hub's list, those that adapters are commonly under; any other is called "other", by its name.
_LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-sa-4.0", "cc0-1.0", "gemma", "gpl-3.0", "lgpl-3.0", "llama3.2", "mit", "mpl-2.0", "openrail", "unlicense",
}  # fmt: skip
_PIPELINES = {"contrastive": "zero-shot-image-classification", "vqa": "image-text-to-text"}  # task -> the hub's word
_NOT_SCORES = {"n"}
_NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says beside the manifest: of the files that it lies with.

    Attributes:
        version: of the adapter, such as ``version 17``.
        digest: SHA-256 of its manifest.
        relation: to the base, in the hub's words.
        library_name: what opens them, in the hub's words; None where no library that the hub knows does.
        loading: code by which they are opened.
        loading_language: what it is written in.
        checks: a sentence on what is checked that way.
    """

    version: str
    digest: str
    relation: Literal["adapter", "finetune"] = "adapter"
    library_name: str | None
    loading: str
    loading_language: Literal["python", "bash"] = "python"
    checks: str


def model_card(manifest: AdapterManifest, card: Card) -> str:
    """Returns the card: front matter that the hub reads, and a page for people."""
    return f"---\n{_front_matter(manifest, card)}\n---\n\n{_page(manifest, card)}"


def _front_matter(manifest: AdapterManifest, card: Card) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = _PIPELINES[manifest.prompt.name]
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
    # The licence is the adapter's: what holds the base's weights too is under the base's as well.
    license = (manifest.license or "").lower() if card.relation == "adapter" else ""
    fields: dict[str, Any] = {
        "base_model": manifest.base.hub_id,
        "base_model_relation": card.relation,
        "library_name": card.library_name,
        "pipeline_tag": task,
        "tags": [
            "finetune-vlm",
            *(part.method for part in manifest.adapter.parts),
            manifest.training.domain,
            *(["synthetic"] if manifest.synthetic else []),
        ],
        "license": license if license in _LICENSES else "other" if license else None,
        "license_name": manifest.license if license and license not in _LICENSES else None,
        "model_name": manifest.full_name,
        "eval_results": scores or None,
    }
    return safe_block(str(ModelCardData(**fields).to_yaml(line_break="\n")).rstrip("\n"))


def _scores(manifest: AdapterManifest, when: str) -> dict[str, float]:
    scores = manifest.summary()["metrics"].get(when, {})
    return {k: v for k, v in scores.items() if not isinstance(v, bool) and k not in _NOT_SCORES}


def _page(manifest: AdapterManifest, card: Card) -> str:
    base, record = manifest.base, manifest.training
    where = f"`{base.hub_id}`" + (f" at `{base.revision}`" if base.revision else "") if base.hub_id else "a local base"
    rows = ", ".join(
        f"{split} {number}" + (f" (`{record.data[split][:16]}`)" if split in record.data else "")
        for split, number in record.rows.items()
    )
    methods, domain = manifest.adapter.methods, markdown(record.domain)
    what, tie, licensed = f"An adapter ({methods}) for {where} (`{base.model_type}`)", "It fits that base only:", ""
    if card.relation == "finetune":
        what = f"A whole model: {where} (`{base.model_type}`) with an adapter ({methods}) in its weights"
        tie, licensed = "The base was that with", " of the adapter, beside that of the base"
    lines = [
        f"# {manifest.full_name}, {card.version}",
        "",
        f"{what}, of {domain}, task {markdown(record.task)}. {tie} weights and config with the digest `{base.digest}`.",
        *(["", "**Trained on pictures that were drawn by a program.**"] if manifest.synthetic else []),
        "",
        markdown_block(card.loading, card.loading_language),
        "",
        card.checks,
        "",
        *_asking(manifest),
        *_images(manifest),
        *_table(manifest),
        f"Trained {record.steps} steps with seed {record.seed}; rows, with the digest of their texts and pictures: "
        f"{rows or 'not told'}. Recipe `{record.recipe_digest[:16]}`.",
        "",
        f"Intended use: {markdown(manifest.intended_use or _NOT_STATED)}",
        "",
        f"Limits: trained and evaluated on {domain} alone; asked about anything else it tends to answer in the "
        "words of its own domain. The scores hold for rows like those of its test split, and say nothing of others.",
        "",
        f"Licence{licensed}: {markdown(manifest.license or _NOT_STATED)}. Manifest: `sha256:{card.digest}`.",
    ]
    return "\n".join(lines) + "\n"


def _asking(manifest: AdapterManifest) -> list[str]:
    """Returns how the adapter was asked in training; asked otherwise, it answers otherwise."""
    contract = manifest.prompt
    if not isinstance(contract, VqaContract):
        return [f"Its texts were written so: {markdown_code(contract.text_template)}.", ""]
    system = f", after the system prompt {markdown_code(contract.system_prompt)}" if contract.system_prompt else ""
    return [
        f"It was asked so, image {contract.image_position}: {markdown_code(contract.question_template)}{system}; "
        f"answers are decoded greedily, at most {contract.generation.max_new_tokens} tokens.",
        "",
    ]


def _images(manifest: AdapterManifest) -> list[str]:
    """Returns how images were opened, where that is not the same for everybody."""
    images = manifest.images
    said = []
    if images.range:
        low, high = images.range
        said.append(f"in images of more than 8 bits the value {low} is black and {high} white")
    if images.page:
        said.append(f"of a TIFF page {images.page} is shown")
    return [f"Images are opened so: {'; '.join(said)}.", ""] if said else []


def _table(manifest: AdapterManifest) -> list[str]:
    before, after = _scores(manifest, "before"), _scores(manifest, "after")
    if not (before or after):
        return []
    rows = [
        f"| {markdown_cell(name)} | {_number(before.get(name))}{_interval(manifest, 'before', name)} | "
        f"{_number(after.get(name))}{_interval(manifest, 'after', name)} |"
        for name in dict.fromkeys([*before, *after])
    ]
    return ["| test split | base alone | with the adapter |", "|---|---|---|", *rows, ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _interval(manifest: AdapterManifest, when: str, name: str) -> str:
    """Returns the 95 % interval of a score, in brackets; the manifest keeps that of exact_match."""
    interval = manifest.metrics.get(when, {}).get("interval")
    if name != "exact_match" or not isinstance(interval, list) or len(interval) != 2:
        return ""
    return f" ({' to '.join(_number(value) for value in interval if isinstance(value, int | float))})"

"""The model card for the Hugging Face Hub, of an adapter or a merged model, made from the manifest."""

from dataclasses import dataclass
from typing import Any, Literal

from finetune.adapters.manifest import AdapterManifest
from finetune.core.outside_text import markdown, markdown_block, markdown_cell, markdown_code, safe_block
from finetune.metrics.names import BASE, TEST, summarized
from finetune.recipe import LabelSection, PromptSection

CARD_NAME = "README.md"
# The common licenses of the hub's list; any other is "other", with its name in license_name.
_LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-sa-4.0", "cc0-1.0", "gemma", "gpl-3.0", "lgpl-3.0", "llama3.2", "mit", "mpl-2.0", "openrail", "unlicense",
}  # fmt: skip
_NOT_SCORES = {"n"}
_NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts on a card that are not in the manifest, about the files beside the card.

    Attributes:
        version: the version of the adapter, such as ``version 17``.
        digest: the SHA-256 of the adapter's manifest.
        relation: the relation to the base, as the hub names it.
        library_name: the library that opens the files, by the hub's name; None if the hub lists none.
        loading: the code that opens the files.
        loading_language: the language of that code.
        checks: a sentence on the checks that this code makes.
    """

    version: str
    digest: str
    relation: Literal["adapter", "finetune"] = "adapter"
    library_name: str | None
    loading: str
    loading_language: Literal["python", "bash"] = "python"
    checks: str


def model_card(manifest: AdapterManifest, card: Card) -> str:
    """Return the card: front matter for the hub, and a page for readers."""
    return f"---\n{_front_matter(manifest, card)}\n---\n\n{_page(manifest, card)}"


def _front_matter(manifest: AdapterManifest, card: Card) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = _pipeline_tag(manifest)
    scores = [
        EvalResult(
            task_type=task,
            dataset_type=manifest.training.domain,
            dataset_name=f"{manifest.full_name}, test split",
            metric_type=name,
            metric_value=value,
        )
        for name, value in _scores(manifest, TEST).items()
    ]
    # The licence covers the adapter. A merged model is also under the licence of its base, so it gets none here.
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


def _pipeline_tag(manifest: AdapterManifest) -> str:
    """Return the hub's task name for the model."""
    task = manifest.task
    if isinstance(task, LabelSection):
        return "zero-shot-image-classification"
    return "image-text-to-text" if isinstance(task, PromptSection) else "other"


def _scores(manifest: AdapterManifest, who: str) -> dict[str, float]:
    """Return name -> value of the metrics over all test rows; names have no prefix ``test.`` or ``base.``."""
    scores = summarized(manifest.metrics).get(who, {})
    return {k: v for k, v in scores.items() if not isinstance(v, bool) and k not in _NOT_SCORES}


def _page(manifest: AdapterManifest, card: Card) -> str:
    base, record = manifest.base, manifest.training
    where = f"`{base.hub_id}`" + (f" at `{base.revision}`" if base.revision else "") if base.hub_id else "a local base"
    rows = ", ".join(
        f"{split} {number}" + (f" (`{record.data[split][:16]}`)" if split in record.data else "")
        for split, number in record.rows.items()
    )
    methods, domain = manifest.adapter.methods, markdown(record.domain)
    what, tie, licensed = f"An adapter ({methods}) for {where} (`{base.model_type}`)", "It fits only that base:", ""
    if card.relation == "finetune":
        what = f"A whole model: {where} (`{base.model_type}`) with an adapter ({methods}) in its weights"
        tie, licensed = "The base has", " of the adapter, beside that of the base"
    lines = [
        f"# {manifest.full_name}, {card.version}",
        "",
        f"{what}, of {domain}, task {markdown(record.task)}. {tie} weights and config with the digest `{base.digest}`.",
        *(["", "**Trained on images that were drawn by a program.**"] if manifest.synthetic else []),
        "",
        markdown_block(card.loading, card.loading_language),
        "",
        card.checks,
        "",
        *_asking(manifest),
        *_images(manifest),
        *_table(manifest),
        f"Trained {record.steps} steps with seed {record.seed}; rows, with the digest of their texts and images: "
        f"{rows or _NOT_STATED}. Recipe `{record.recipe_digest[:16]}`.",
        "",
        f"Intended use: {markdown(manifest.intended_use or _NOT_STATED)}",
        "",
        f"Limits: trained and evaluated only on {domain}; on other inputs it tends to answer in the words of its own "
        "domain. The scores hold only for rows like those of its test split.",
        "",
        f"Licence{licensed}: {markdown(manifest.license or _NOT_STATED)}. Manifest: `sha256:{card.digest}`.",
    ]
    return "\n".join(lines) + "\n"


def _asking(manifest: AdapterManifest) -> list[str]:
    """Return the lines about the prompt of the training, since another prompt changes the answers."""
    task = manifest.task
    if isinstance(task, LabelSection):
        return [f"Texts of the training: {markdown_code(task.text_template)}.", ""]
    if not isinstance(task, PromptSection):
        return []
    system = f", after the system prompt {markdown_code(task.system_prompt)}" if task.system_prompt else ""
    asked = f", for captions with the question {markdown_code(task.caption_question)}" if task.caption_question else ""
    how = f"answers are decoded greedily, at most {task.longest_answer} tokens"
    if task.allowed_answers is not None:
        how = f"an answer is the most likely of the labels {markdown_code(', '.join(task.allowed_answers))}"
    prompt = f"image {task.image_position}: {markdown_code(task.question_template)}{system}{asked}"
    return [
        f"Prompt of the training, {prompt}; {how}.",
        "",
    ]


def _images(manifest: AdapterManifest) -> list[str]:
    """Return the lines about the image settings, if the adapter has any."""
    images = manifest.images
    settings = []
    if images.range:
        low, high = images.range
        settings.append(f"in images of more than 8 bits, the value {low} is black and {high} is white")
    if images.page:
        settings.append(f"page {images.page} of a TIFF")
    return [f"Images of the training: {'; '.join(settings)}.", ""] if settings else []


def _table(manifest: AdapterManifest) -> list[str]:
    scores = {who: _scores(manifest, who) for who in (BASE, TEST)}
    names = dict.fromkeys([*scores[BASE], *scores[TEST]])
    if not names:
        return []
    rows = []
    for name in names:
        cells = [_cell(manifest, who, name, of.get(name)) for who, of in scores.items()]
        rows.append(f"| {markdown_cell(name)} | {' | '.join(cells)} |")
    return ["| test split | base alone | with the adapter |", "|---|---|---|", *rows, ""]


def _cell(manifest: AdapterManifest, who: str, name: str, value: float | None) -> str:
    """Return a value with its unit, and its 95 % interval in brackets, if it has them."""
    if value is None:
        return ""
    recorded = _recorded(manifest.metrics.get(who), name)
    unit, interval = recorded.get("unit"), recorded.get("interval")
    shown = _number(value) + (f" {markdown_cell(unit)}" if isinstance(unit, str) and unit else "")
    if not isinstance(interval, list) or len(interval) != 2:
        return shown
    return f"{shown} ({' to '.join(_number(value) for value in interval if isinstance(value, int | float))})"


def _recorded(scores: Any, name: str) -> dict[str, Any]:
    """Return the manifest's record of a metric, or of ``BASELINE.METRIC``; empty for a plain number."""
    of, _, metric = name.partition(".")
    for path in (("values", name), ("baselines", of, metric)):
        found = scores
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict):
            return found
    return {}


def _number(value: float) -> str:
    return f"{value:.4g}"

"""Manifests of schema 2, with scores under `before` and `after`, converted into the form of schema 3."""

from typing import Any

from finetune.core.old_names import METHODS
from finetune.errors import ManifestError
from finetune.metrics.names import summarized

_WHO = {"before": "base", "after": "test"}
_BASELINES = ("majority", "blank_image")
_FIXED = ("n", "truncated", "interval", "by_kind", *_BASELINES)


def from_schema_2(data: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Return the fields of a manifest of schema 2 under the names of schema 3.

    Args:
        data: the parsed JSON; this function does not change it.
        source: the path or name of the manifest, for errors.

    Raises:
        ManifestError: the manifest has a field of a later schema.
    """
    later = [name for name in ("task", "plugins") if name in data]
    if later:
        raise ManifestError(f"{source} is not a valid manifest of schema 2: {later[0]} belongs to a later schema")
    out = dict(data)
    if isinstance(prompt := out.pop("prompt", None), dict):
        if strange := sorted({"max_new_tokens", "metrics"} & prompt.keys()):
            raise ManifestError(
                f"{source} is not a valid manifest of schema 2: prompt.{strange[0]} belongs to a later schema"
            )
        out["task"] = _task(prompt)
    if isinstance(metrics := data.get("metrics"), dict):
        out["metrics"] = metrics_from_schema_2(metrics)
    return out | {"schema_version": 3}


def metrics_from_schema_2(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of schema 2 in the form of schema 3, and any other scores unchanged.

    In schema 2, ``before`` and ``after`` hold the scores of the base and the adapter. Each is a flat object: one share
    of rows under the name of its metric, with its interval, its baselines and counts. Missing fields stay missing.
    """
    return {
        _WHO.get(who, who): _scores(scores) if who in _WHO and isinstance(scores, dict) else scores
        for who, scores in metrics.items()
    }


def summary_from_schema_2(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of a manifest under the names of schema 3; a summary with these names is unchanged."""
    if isinstance(method := summary.get("method"), str):
        summary = summary | {"method": "+".join(METHODS.get(name, name) for name in method.split("+"))}
    metrics = summary.get("metrics")
    return summary | {"metrics": summarized(metrics_from_schema_2(metrics))} if metrics else summary


def _scores(old: dict[str, Any]) -> dict[str, Any]:
    n, interval = old.get("n"), old.get("interval")
    names = sorted(name for name, value in old.items() if name not in _FIXED and isinstance(value, int | float))
    new: dict[str, Any] = {"values": {name: _value(old[name], n, interval) for name in names}}
    # Schema 2 has one metric, so the baselines belong to it.
    baselines = {of: old[of] for of in _BASELINES if isinstance(old.get(of), int | float)}
    new["baselines"] = {of: {name: _value(value, n) for name in names[:1]} for of, value in baselines.items()}
    new |= {key: old[key] for key in ("n", "truncated") if key in old}
    if isinstance(parts := old.get("by_kind"), dict):
        new["by_question_type"] = {name: _scores(part) for name, part in parts.items() if isinstance(part, dict)}
    return new


def _value(value: float, n: Any, interval: Any = None) -> dict[str, Any]:
    return {"value": value, "interval": interval, "n": n, "unit": None, "higher_is_better": True}


def _task(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the task from the prompt settings of schema 2."""
    task = dict(prompt)
    if "question_template" in task:
        task.setdefault("image_position", "first")
    generation = task.pop("generation", None)
    if isinstance(generation, dict):
        # Schema 2 also lists sampling and beams, always those of greedy decoding; other values fail as unknown keys.
        greedy = {"do_sample": False, "num_beams": 1}
        task |= {key: value for key, value in generation.items() if key not in greedy or value != greedy[key]}
    return task

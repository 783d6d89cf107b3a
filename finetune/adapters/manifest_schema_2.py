"""Manifests of schema 2: read for ever, brought into the form of today's schema."""

from typing import Any

from finetune.errors import ManifestError


def from_schema_2(data: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Return the fields of a manifest of schema 2 under the names of schema 3, for the check that every manifest gets.

    Args:
        data: the parsed JSON; it is not changed.
        source: where it came from, for errors.

    Raises:
        ManifestError: it holds what schema 2 does not have.
    """
    later = [name for name in ("task", "plugins") if name in data]
    if later:
        raise ManifestError(f"{source}: not a manifest of schema 2: {later[0]} belongs to a later schema")
    out = dict(data)
    if isinstance(prompt := out.pop("prompt", None), dict):
        out["task"] = _task(prompt)
    return out | {"schema_version": 3}


def _task(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the task from what schema 2 kept of the prompt."""
    task = dict(prompt)
    if "question_template" in task:
        task.setdefault("image_position", "first")
    generation = task.pop("generation", None)
    if isinstance(generation, dict):
        # Sampling and beams stood there too, always as greedy decoding has them.
        if generation.get("do_sample", False) is not False or generation.get("num_beams", 1) != 1:
            task["generation"] = generation
        else:
            extra = generation.keys() - {"max_new_tokens", "do_sample", "num_beams"}
            task |= {"max_new_tokens": generation.get("max_new_tokens"), **{name: generation[name] for name in extra}}
    return task

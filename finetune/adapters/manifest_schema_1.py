"""Manifests of schema 1, from release 0.1: they stay readable, and are brought into the form of schema 2."""

from typing import Any

from finetune.errors import ManifestError

# Fields that schema 1 does not have: section, name.
_LATER = (
    ("training", "recipe_digest"),
    ("prompt", "image_position"),
    ("prompt", "decimal_separator"),
)


def from_schema_1(data: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Return the fields of a manifest of schema 1 under the names of schema 2, which is read in turn.

    What schema 1 did not record is filled in with what was done then: images stood before a question's text, 16-bit
    images were scaled from 0 to 65535, and a TIFF was read as its first page. The recipe itself was not kept, only its
    digest.

    Args:
        data: the parsed JSON, which is not changed.
        source: the place that the JSON came from, for errors.

    Raises:
        ManifestError: it holds what schema 1 does not have.
    """
    out = {key: dict(part) if isinstance(part, dict) else part for key, part in data.items()}
    for section, name in _LATER:
        if isinstance(part := out.get(section), dict) and name in part:
            raise ManifestError(f"{source}: not a manifest of schema 1: {section}.{name} belongs to a later schema")
    if "images" in out:
        raise ManifestError(f"{source}: not a manifest of schema 1: images belongs to a later schema")
    prompt, training = out.get("prompt"), out.get("training")
    if isinstance(prompt, dict) and prompt.get("answer_normalization", "vqa") != "vqa":
        raise ManifestError(f"{source}: not a manifest of schema 1: prompt.answer_normalization must be 'vqa'")
    if isinstance(training, dict) and "recipe" in training:
        training["recipe_digest"] = training.pop("recipe")
    return out | {"schema_version": 2, "images": {"range": [0, 65535], "page": 1}}

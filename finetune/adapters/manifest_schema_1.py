"""Manifests of schema 1, from release 0.1, converted into the form of schema 2."""

from typing import Any

from finetune.errors import ManifestError, brief

# Fields that schema 1 does not have: section, name.
_LATER = (
    ("training", "recipe_digest"),
    ("prompt", "image_position"),
    ("prompt", "decimal_separator"),
)


def from_schema_1(data: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Return the fields of a manifest of schema 1 under the names of schema 2.

    Fields that schema 1 lacks get the behaviour of that release: images before a question's text, 16-bit images scaled
    from 0 to 65535, and the first page of a TIFF. Schema 1 keeps the digest of the recipe, not the recipe itself.

    Args:
        data: the parsed JSON; this function does not change it.
        source: the path or name of the manifest, for errors.

    Raises:
        ManifestError: the manifest has a field of a later schema.
    """
    out = {key: dict(part) if isinstance(part, dict) else part for key, part in data.items()}
    for section, name in _LATER:
        if isinstance(part := out.get(section), dict) and name in part:
            raise ManifestError(
                f"{source} is not a valid manifest of schema 1: {section}.{name} belongs to a later schema"
            )
    if "images" in out:
        raise ManifestError(f"{source} is not a valid manifest of schema 1: images belongs to a later schema")
    prompt, training = out.get("prompt"), out.get("training")
    if isinstance(prompt, dict) and (rules := prompt.get("answer_normalization", "vqa")) != "vqa":
        raise ManifestError(
            f"{source} is not a valid manifest of schema 1: prompt.answer_normalization must be 'vqa', got "
            f"{brief(rules)}"
        )
    if isinstance(training, dict) and "recipe" in training:
        training["recipe_digest"] = training.pop("recipe")
    return out | {"schema_version": 2, "images": {"range": [0, 65535], "page": 1}}

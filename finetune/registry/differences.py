"""The differences between two versions: their base, recipe and data, and their metrics."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.adapters.manifest import AdapterDescription, AdapterManifest, canonical_json, sha256_hex
from finetune.metrics.names import named_values
from finetune.registry.log.versions import Version
from finetune.registry.registry import AdapterRegistry
from finetune.registry.storage.adapter_folders import load_manifest


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One difference between two versions.

    Attributes:
        path: the path in their manifests, such as ``training.seed``; for a metric its name, see
            ``finetune.metrics.names``.
        a: the value in the first version; None when it is missing.
        b: the value in the second version; None when it is missing.
        change: ``b - a`` of two numbers; None for other values.
    """

    path: str
    a: Any
    b: Any
    change: float | None


def differences(registry: AdapterRegistry, a: Version, b: Version) -> list[Difference]:
    """Return the differences between the manifests of two versions, without the name and the time of saving.

    The settings of their recipes have paths below ``recipe``, such as ``recipe.train.learning_rate``. When one version
    has no recipe, because an earlier release saved it, only the digests of the recipes are compared.

    The table of tensors and the values of the probe have thousands of values, so a summary of each is compared.

    Args:
        registry: the registry that holds both.
        a: the first version.
        b: the second version, of the same adapter or of another.

    Raises:
        IntegrityError: a manifest is damaged.
    """
    manifests = [read_manifest(registry, version) for version in (a, b)]
    recipes = [manifest.training.recipe for manifest in manifests]
    if None in recipes or recipes[0] == recipes[1]:
        recipes = [None, None]
    facts = [_facts(manifest, recipe) for manifest, recipe in zip(manifests, recipes, strict=True)]
    old, new = (dict(_leaves(each)) for each in facts)
    sections = list(facts[0])
    # A path that only one of them has is sorted into its section too.
    paths = sorted(dict.fromkeys([*old, *new]), key=lambda path: sections.index(path[0]))
    return [
        Difference(path=_name(path), a=old.get(path), b=new.get(path), change=_change(old.get(path), new.get(path)))
        for path in paths
        if old.get(path) != new.get(path)
    ]


def read_manifest(registry: AdapterRegistry, version: Version) -> AdapterManifest:
    """Return the manifest of a published version, its bytes checked.

    Raises:
        IntegrityError: the manifest is damaged.
    """
    return load_manifest(registry.store, version.digest, version.full_name)[1]


def _facts(manifest: AdapterManifest, recipe: dict[str, Any] | None) -> dict[str, Any]:
    sections: dict[str, Any] = manifest.model_dump(
        exclude={"schema_version", "namespace", "name", "created", "adapter", "probe"}
    )
    sections |= {"adapter": _adapter(manifest.adapter), "probe": _digest(manifest.probe.model_dump())}
    sections["metrics"] = named_values(manifest.metrics)
    del sections["training"]["recipe"]
    if recipe is not None:
        del sections["training"]["recipe_digest"]  # the settings below ``recipe`` show more
        sections["recipe"] = _by_name(recipe)
    else:
        sections["recipe"] = {}
    first = ("recipe", "training", "adapter", "task", "metrics", "base", "processor", "files", "toolchain")
    return {section: sections[section] for section in dict.fromkeys([*first, *sections])}


def _by_name(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with its methods by their names, so that each difference has its own path."""
    methods = recipe.get("method")
    if not isinstance(methods, list) or not all(isinstance(each, dict) and "name" in each for each in methods):
        return recipe
    return {**recipe, "method": {str(each["name"]): each for each in methods}}


def _adapter(adapter: AdapterDescription) -> dict[str, Any]:
    return {
        "peft_type": adapter.peft_type,
        **{part.method: {"options": part.options, "modules": part.modules} for part in adapter.parts},
        "tensors": {
            "number": len(adapter.tensors),
            "parameters": sum(math.prod(entry.shape) for entry in adapter.tensors.values()),
            "table": _digest({name: entry.model_dump() for name, entry in adapter.tensors.items()}),
        },
    }


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path[1:] if path[0] == "metrics" else path)


def _digest(value: Any) -> str:
    return sha256_hex(canonical_json(value))


def _leaves(value: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, part in value.items():
        if isinstance(part, Mapping):
            yield from _leaves(part, (*above, key))
        else:
            yield (*above, key), part


def _change(a: Any, b: Any) -> float | None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    return b - a if numbers else None

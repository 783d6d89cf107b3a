"""Adapters with random weights, saved and published as trained ones are."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.adapters.manifest import MANIFEST_NAME, AdapterManifest
from finetune.methods.adapter import attach, detach
from finetune.recipe import parse_recipe
from finetune.registry import AdapterRegistry
from finetune.runs.saving import probe_effect, save_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.assemble.base import Base


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """One adapter under many names, each with a manifest of its own.

    Attributes:
        folder: the folder of the adapter, which PEFT opens.
        refs: the references of the adapters that become loaded.
        cold: the references of others, which are unknown before they are loaded.
    """

    folder: Path
    refs: list[str]
    cold: list[str]


def make_adapter(
    base: Base, folder: Path, *, r: int, seed: int = 0, max_new_tokens: int = 16, std: float = 0.02
) -> Path:
    """Save a LoRA on all linear modules of the language model, with random weights; return its folder.

    Args:
        base: the base of the adapter; it is unchanged afterwards.
        folder: the folder in which the adapter is saved.
        r: its rank.
        seed: the seed of the weights.
        max_new_tokens: the largest number of tokens of an answer.
        std: the standard deviation of the weights.
    """
    recipe = parse_recipe(
        {
            "name": "adapter",
            "domain": "bench",
            "model": {"name_or_path": base.path},
            "method": {"name": "lora", "r": r, "lora_alpha": 2 * r},
            "data": {"source": "procedural", "name": "medical"},
            "task": {"name": "vqa", "max_new_tokens": max_new_tokens},
            "train": {"max_steps": 1},
        },
        source="benchmarks.swap",
    )
    attachment = attach(base.host, recipe.method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters.values():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    attachment.freeze()
    probe = probe_effect(base, attachment)
    save_adapter(folder, recipe, base, attachment, {}, {}, probe=probe, steps=0)
    detach(base.model)
    return folder


def make_adapters(base: Base, folder: Path, *, count: int, num_cold: int, r: int) -> Adapters:
    """Publish one adapter under many names.

    Args:
        base: the base of the adapter.
        folder: the folder for all that is saved.
        count: the number of names that become loaded.
        num_cold: the number of other names.
        r: its rank.
    """
    saved = make_adapter(base, folder / "adapter", r=r)
    manifest = AdapterManifest.parse((saved / MANIFEST_NAME).read_bytes(), source=MANIFEST_NAME)
    registry, refs = AdapterRegistry(), []
    named = folder / "named"
    shutil.copytree(saved, named)
    for number in range(count + num_cold):
        one = AdapterManifest.model_validate(manifest.model_dump() | {"name": f"adapter-{number}"})
        (named / MANIFEST_NAME).write_bytes(one.to_bytes())
        refs.append(registry.publish(named, aliases=["prod"]).full_name + "@prod")
    return Adapters(folder=saved, refs=refs[:count], cold=refs[count:])

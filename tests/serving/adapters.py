"""Finished adapters with random weights, for tests of what serves them."""

import torch

from finetune.methods.adapter import attach, detach
from finetune.runs.saving import probe_effect, save_adapter
from tests.matrix import recipe_of, rows

LORA = {"name": "lora", "r": 4, "lora_alpha": 16}
PROMPT = {"name": "prompt_tuning", "num_virtual_tokens": 3}
FULL_MODULES = {"name": "full_modules", "parameters": ["projector", "norms"]}
TOWERS = {"language": "all-linear", "projector": {"target_modules": "all-linear", "r": 2, "lora_alpha": 3}}
KINDS = {
    "lora": LORA,
    "wide lora": {**LORA, "r": 12, "use_rslora": True, "towers": {"language": ["q_proj", "down_proj"]}},
    "patterns": {**LORA, "towers": TOWERS},
    "rslora": {**LORA, "use_rslora": True, "towers": TOWERS},
    "dora": {**LORA, "use_dora": True},
    "prompt": PROMPT,
    "full_modules": FULL_MODULES,
    "everything": [LORA, PROMPT, FULL_MODULES],
}


def make_adapter(base, kind, folder, *, seed=0, name="cell", domain="testing", strength=1.0):
    """Save an adapter of one of ``KINDS`` that changes what ``base`` says; leave the base as it was."""
    recipe = recipe_of(KINDS[kind], base.path, folder / "run")
    recipe = recipe.model_copy(update={"name": name, "domain": domain})
    attachment = attach(base.host, recipe.method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters.values():
            size = strength * (0.5 if parameter.ndim > 1 else 0.1)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size * parameter.abs().mean().clamp(0.1))
    attachment.freeze()
    base.model.eval()
    probe = probe_effect(base, attachment)
    save_adapter(folder, recipe, base, attachment, {"train": rows(1)}, {}, probe=probe, steps=1)
    detach(base.model)
    return folder

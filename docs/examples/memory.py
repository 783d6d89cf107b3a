"""Compute the memory of a recipe's base and adapter from the config of the base alone, without its weights.

    python docs/examples/memory.py CONFIG.yaml [key=value ...]

The base counts its weights: those of the linear modules of the language tower by `model.quantization`, all others by
`model.dtype`. LoRA counts its weights, their gradients and the two states of AdamW, each in float32. Activations,
features and the memory of CUDA itself are not counted.
"""

import sys

from torch import nn

from finetune.families.base import embedded_path, family_of
from finetune.methods.targets import named_targets
from finetune.recipe import LoraSection, load_recipe

DTYPE = {"float32": 4, "bfloat16": 2}  # bytes of a weight
# 4bit: half a byte, a byte of scale for 64 weights, and 4 bytes for 256 of these scales. 8bit: a byte.
QUANTIZED = {"4bit": 1 / 2 + 1 / 64 + 4 / (64 * 256), "8bit": 1}
ADAMW = 4 * 4  # bytes of a trained value: itself, its gradient and two states, in float32


def main() -> None:
    """Print one line for the base and one for the adapter."""
    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    path = embedded_path(recipe.model.name_or_path)
    family = family_of(path, revision=recipe.model.revision)
    model = family.skeleton(path, revision=recipe.model.revision)
    towers = family.towers(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    packed = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(f"{tower}." for tower in towers["language"]))
    )
    if recipe.model.quantization is None:
        packed = 0
    base = (parameters - packed) * DTYPE[recipe.model.dtype] + packed * QUANTIZED.get(
        recipe.model.quantization or "", 0
    )
    print(f"base     {parameters:>13,} parameters  {base / 1e9:7.3f} GB")
    for part in recipe.method:
        if isinstance(part, LoraSection):
            trained = 0
            for tower, names in named_targets(model, towers, part.towers).items():
                rank = part.towers.of(tower).r or part.r
                modules = [model.get_submodule(name) for name in names]
                trained += sum(rank * (module.in_features + module.out_features) for module in modules)
            print(f"adapter  {trained:>13,} parameters  {trained * ADAMW / 1e9:7.3f} GB")


if __name__ == "__main__":
    main()

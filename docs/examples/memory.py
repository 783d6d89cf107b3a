"""Compute the memory of a recipe's base and adapter from the config of the base alone, without its weights.

    python docs/examples/memory.py CONFIG.yaml [key=value ...]

The base counts its weights: those of the linear modules of the language tower by `model.quantization`, all others by
`model.dtype`. LoRA counts its weights, their gradients and the two states of AdamW, each in float32. Activations,
features and the memory of CUDA itself are not counted.
"""

import sys
from math import ceil

from torch import nn

from finetune.families.base import embedded_path, family_of
from finetune.methods.targets import named_targets
from finetune.recipe import LoraSection, load_recipe

DTYPE = {"float32": 4, "bfloat16": 2}  # bytes of a weight
ADAMW = 4 * 4  # bytes of a trained value: itself, its gradient and two states, in float32


def main() -> None:
    """Print one line for the base and one for the adapter."""
    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    path = embedded_path(recipe.model.name_or_path)
    family = family_of(path, revision=recipe.model.revision)
    model = family.skeleton(path, revision=recipe.model.revision)
    towers = family.towers(model)
    inside = tuple(f"{tower}." for tower in towers["language"])
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(inside)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = parameters * DTYPE[recipe.model.dtype]
    if recipe.model.quantization:
        size += sum(
            packed(m, recipe.model.quantization) - m.weight.numel() * DTYPE[recipe.model.dtype] for m in linears
        )
    print_line("base", parameters, size)
    for part in recipe.method:
        if isinstance(part, LoraSection):
            trained = 0
            for tower, names in named_targets(model, towers, part.towers).items():
                rank = part.towers.of(tower).r or part.r
                modules = [model.get_submodule(name) for name in names]
                trained += sum(rank * (module.in_features + module.out_features) for module in modules)
            print_line("adapter", trained, trained * ADAMW)


def packed(module: nn.Linear, quantization: str) -> float:
    """Return the bytes of a quantized weight with its scales."""
    number = module.weight.numel()
    if quantization == "8bit":
        return number + 4 * module.out_features  # a byte, and a scale for each row
    scales = ceil(number / 64)  # a byte each, and 4 bytes for 256 of them
    return number / 2 + scales + 4 * ceil(scales / 256)


def print_line(what: str, parameters: int, size: float) -> None:
    """Print the number of parameters and bytes."""
    print(f"{what:<8} {parameters:>13,} parameters {size:>16,.0f} bytes {size / 1e9:7.3f} GB")


if __name__ == "__main__":
    main()

"""docs/hardware.md: the script computes what a loaded base takes, and the page has its numbers."""

import re
import runpy
import sys

import pytest
import torch

import benchmarks.models
from finetune.assemble.loading import load_base
from finetune.families.quantization import quantized_modules
from finetune.methods.adapter import attach
from finetune.recipe import load_recipe
from tests.docs_code import DOCS, sections

SCRIPT = DOCS / "examples" / "memory.py"
TABLE = re.findall(
    r"^\| (\w\S+) \| ([\d,]+) \| ([\d,]+) \| (.*?) \|$", sections("hardware.md")["Computed"], re.MULTILINE
)
HELD = ("model.dtype=float32", "model.dtype=bfloat16", "model.quantization=8bit", "model.quantization=4bit")


@pytest.fixture
def computed(tmp_path, monkeypatch, capsys):
    """Return a function that runs the script: parameters, bytes and GB of the base, and of the adapter."""
    config = tmp_path / "mine.yaml"
    config.write_text(
        "name: mine\ndomain: docs\nmodel: {name_or_path: pocket, dtype: bfloat16, device: cpu}\n"
        "method: {name: lora, r: 16}\ndata: {source: procedural, name: retail}\ntrain: {epochs: 1}\n"
    )

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(config), *overrides])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        lines = re.findall(r"([\d,]+) parameters +([\d,]+) bytes +(\d.*)$", capsys.readouterr().out, re.MULTILINE)
        numbers = [(int(number.replace(",", "")), int(size.replace(",", "")), shown) for number, size, shown in lines]
        return numbers, load_recipe(config, overrides)

    return run


@pytest.mark.parametrize("held", [*HELD[:2], *(f"{name} model.dtype=float32" for name in HELD[2:])])
def test_it_computes_what_is_loaded(held, computed):
    [(parameters, size, _), (trained, _, _)], recipe = computed(*held.split())
    model = recipe.model
    base = load_base("pocket", device="cpu", dtype=model.dtype, quantization=model.quantization)
    names = quantized_modules(base.model)
    tensors = {id(tensor): tensor for tensor in base.model.parameters()}
    tensors |= {id(value): value for name in names for value in states(base.model.get_submodule(name).weight)}
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    # The tables of 16 and of 256 numbers that a 4-bit weight brings, whatever its size, are not computed.
    assert 0 <= found - size <= (len(names) * 4 * (16 + 256 + 1) if model.quantization == "4bit" else 0)
    if model.quantization is None:
        assert parameters == sum(parameter.numel() for parameter in base.model.parameters())
        attachment = attach(base.host, recipe.method)
        assert trained == sum(parameter.numel() for parameter in attachment.parameters.values())


def states(weight):
    """Return the tensors that bitsandbytes keeps beside a weight."""
    if getattr(weight, "SCB", None) is not None:
        return [weight.SCB]
    state = weight.quant_state
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_the_page_has_its_numbers(row, computed, tmp_path, monkeypatch):
    def save_config(model, processor, folder, dtype):
        model.config.save_pretrained(folder)
        return folder

    monkeypatch.setattr(benchmarks.models, "_save", save_config)
    setup = {"SmolVLM-256M": "b", "Qwen2.5-VL-3B": "qwen"}[row[0]]
    with torch.device("meta"):
        folder = benchmarks.models.SETUPS[setup].save(tmp_path / "geometry", torch.float32)
    sizes = []
    for held in HELD:
        [(parameters, _, size), (trained, _, adapter)], _ = computed(held, f"model.name_or_path={folder}")
        sizes.append(size)
    assert row[1:] == (f"{parameters:,}", f"{trained:,}", " | ".join([*sizes, adapter]))

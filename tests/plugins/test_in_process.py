"""A method, a source and an export target that a script registers, from a recipe to an app."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

import finetune
from finetune import plugins
from finetune.adapters.folder import read_folder
from finetune.assemble.loading import load_base
from finetune.core.example import Example, answer, as_images
from finetune.errors import ExportError, ManifestError, MethodError, PluginError, RecipeError
from finetune.export.target import Comparison
from finetune.interfaces import Part
from finetune.methods.adapter import attach
from finetune.methods.copies import CopiesMethod, CopiesUpdate
from finetune.methods.modules import language_head
from finetune.recipe import HeadSection, MethodSection, parse_recipe
from finetune.recipe.data import RowsSection

HEAD = "lm_head"


class TunedHeadSection(MethodSection):
    """Full training of the language head."""

    name: Literal["tuned_head"]

    @property
    def adapted_towers(self):
        return {"language"}


class TunedHead(CopiesMethod):
    Config = TunedHeadSection
    trained = "_tuned_head"

    def attach(self, host, options):
        copies = {f"{HEAD}.weight": nn.Parameter(language_head(host.model).weight.detach().float().clone())}
        self.put(host.model, copies)
        return Part(
            method="tuned_head", options={}, modules={"language": list(copies)}, parameters=copies,
            alive_after=dict.fromkeys(copies, 1), unit="parameters",
        )  # fmt: skip

    def check(self, model, towers, options):
        pass

    def expected_tensors(self, model, towers, description):
        if description.names != [f"{HEAD}.weight"]:
            raise ManifestError("a tuned head is lm_head.weight")
        return {f"{HEAD}.weight": tuple(language_head(model).weight.shape)}

    def updates(self, model, description, tensors):
        return {HEAD: CopiesUpdate(model.get_submodule(HEAD), {"weight": tensors[f"{HEAD}.weight"]})}


class ColorsData(RowsSection):
    """Squares of one colour each."""

    source: Literal["colors"]
    rows: int = 8


def read_colors(section, split, *, task, seed, bad):
    rows = []
    for i in range(section.rows if split != "val" else 0):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[..., 2 * (i % 2)] = 200
        text = ("red", "blue")[i % 2]
        rows.append(
            Example(
                id=f"{split}:{i}",
                messages=[*task.ask("What color is it?"), answer(task.text_of(text))],
                media=as_images([pixels]),
                answers=[text],
                meta={"question": "What color is it?"},
            )
        )
    return rows


read_colors.Config = ColorsData


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Writes how large each tensor is."""

    digits: int = 3

    def refuse(self, manifest):
        if manifest.adapter.methods != "tuned_head":
            raise ExportError(f"{manifest.full_name}: norms are of tuned heads alone")

    def make(self, source, folder):
        lines = [f"{name} {tensor.norm().item():.{self.digits}f}" for name, tensor in source.adapter.tensors.items()]
        (folder / "norms.txt").write_text("\n".join(lines) + "\n")
        return [Comparison(what="norms", verdict="passed", largest_difference=0.0, tolerance=0.0)]


NAMES = {"methods": ("tuned_head", TunedHead), "sources": ("colors", read_colors), "exports": ("norms", Norms)}


@pytest.fixture
def registered():
    for group, (name, target) in NAMES.items():
        finetune.register(group, name, target)
    yield
    for group, (name, _) in NAMES.items():
        plugins.unregister(group, name)


@pytest.fixture
def recipe(tiny_fast_vlm, tmp_path):
    return {
        "name": "colors", "domain": "testing", "model": {"name_or_path": str(tiny_fast_vlm), "device": "cpu"},
        "method": {"name": "tuned_head"}, "data": {"source": "colors", "rows": 6}, "task": {"max_new_tokens": 4},
        "train": {"max_steps": 3, "batch_size": 2, "output_dir": str(tmp_path / "runs")},
        "adapter": {"publish": "testing/colors"},
    }  # fmt: skip


def test_a_recipe_trains_publishes_swaps_and_exports_by_names_from_a_script(recipe, registered, tmp_path):
    run = finetune.train(parse_recipe(recipe, source="colors"))
    manifest = read_folder(run.adapter).manifest
    assert (manifest.adapter.methods, manifest.training.rows["train"]) == ("tuned_head", 6)
    assert [(entry.group, entry.name, entry.package) for entry in manifest.plugins] == [("methods", "tuned_head", None)]
    vlm = finetune.load("testing/colors", base=recipe["model"]["name_or_path"], device="cpu")
    adapted = vlm.base.probe(0)
    with vlm.using(None):
        assert not torch.equal(vlm.base.probe(0), adapted)
    assert torch.equal(vlm.base.probe(0), adapted)
    done = finetune.export_adapter(
        "testing/colors", to="norms", output=tmp_path / "out", base=recipe["model"]["name_or_path"], digits=1
    )
    (line,) = (done.folder / "norms.txt").read_text().splitlines()
    assert line.startswith("lm_head.weight ") and len(line.rpartition(".")[2]) == 1
    plugins.unregister("methods", "tuned_head")
    with pytest.raises(PluginError, match="needs the method 'tuned_head', which the training script registered"):
        finetune.load("testing/colors", base=recipe["model"]["name_or_path"], device="cpu")


def test_a_copy_of_a_copy_is_refused(recipe, registered):
    base = load_base(recipe["model"]["name_or_path"], device="cpu")
    sections = [TunedHeadSection(name="tuned_head"), HeadSection(num_outputs=2)]
    with pytest.raises(MethodError, match="two methods train lm_head.weight"):
        attach(base.host, sections)
    assert not vars(base.model).get("_finetune_head") and not vars(base.model).get("_tuned_head")


def test_names_that_nothing_registered_are_unknown(recipe):
    for section, name in (("method", "tuned_head"), ("data", "colors")):
        other = {"name": "lora"} if section == "data" else recipe["method"]
        with pytest.raises(RecipeError, match=f"'{name}'"):
            parse_recipe({**recipe, "method": other}, source="colors")
    with pytest.raises(ExportError, match="unknown target 'norms'"):
        finetune.export_adapter("testing/colors", to="norms")

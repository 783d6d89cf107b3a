"""A run whose adapter starts from the weights of a finished one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.adapters.folder import read_folder
from finetune.errors import TrainingError
from finetune.registry import AdapterRegistry
from finetune.runs.train import train
from finetune.serving.loading import load
from finetune.training.loop import Trainer

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def recipe(make_recipe, tiny_fast_vlm):
    return lambda name="child", base=tiny_fast_vlm, **changes: make_recipe(base, name=name, **changes)


@pytest.fixture
def parent(recipe):
    return train(recipe("parent"))


def begun_with(monkeypatch, recipe):
    """Return the weights that a run has before its first step."""
    found = {}

    def stop(self, *args, **options):
        found.update({name: p.detach().clone() for name, p in self.attachment.parameters.items()})
        raise InterruptedError

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(Trainer, "train", stop)
        train(recipe)
    return found


@pytest.mark.parametrize("way", ["reference", "alias", "folder"])
def test_it_starts_from_the_weights_and_its_manifest_records_them(recipe, parent, monkeypatch, capsys, way):
    asked = {"reference": parent.ref, "alias": "testing/squares", "folder": str(parent.adapter)}[way]
    child = recipe(adapter={"init_from": asked}, method={"lora_dropout": 0.2})  # which is the training's own
    weights = load_file(parent.adapter / WEIGHTS)
    begun = begun_with(monkeypatch, child)
    assert begun.keys() == weights.keys() and all(torch.equal(begun[name], weights[name]) for name in weights)
    result = train(child)
    digest = read_folder(parent.adapter).digest
    assert read_folder(result.adapter).manifest.parents == [f"testing/squares@sha256:{digest}"]
    assert f"its weights start from testing/squares@sha256:{digest}" in capsys.readouterr().out
    assert (result.adapter / WEIGHTS).read_bytes() != (parent.adapter / WEIGHTS).read_bytes()
    assert AdapterRegistry().resolve(result.ref).version == 2
    load(result.ref, base=child.model.name_or_path, device="cpu")


def test_without_it_an_adapter_has_no_parents(parent):
    assert read_folder(parent.adapter).manifest.parents == []


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"r": 8}, r"lora.options.r was 4 and is now 8"),
        ({"lora_alpha": 16}, r"lora.options.lora_alpha was 8.0 and is now 16.0"),
        ({"towers": {"projector": "none"}}, r"lora.modules.projector was \['.* and is now "),
        ([{"name": "lora", "r": 4, "lora_alpha": 8, "towers": {"projector": "all-linear"}},
          {"name": "prompt_tuning", "num_virtual_tokens": 2}], "prompt_tuning was None and is now"),
    ],
)  # fmt: skip
def test_another_method_is_one_error_before_training(recipe, parent, monkeypatch, method, message):
    monkeypatch.setattr(Trainer, "train", None)
    with pytest.raises(
        TrainingError, match=f"adapter.init_from: the adapter must have .* but testing/squares differs: .*{message}"
    ):
        train(recipe(method=method, adapter={"init_from": "testing/squares"}))


def test_another_base_is_one_error_before_rows_are_read(recipe, parent, tmp_path, monkeypatch):
    other = shutil.copytree(recipe().model.name_or_path, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "something": 1}))
    monkeypatch.setattr("finetune.runs.run.read_run_rows", None)
    with pytest.raises(TrainingError, match=f"adapter.init_from: {parent.ref}: .*base"):
        train(recipe(base=other, adapter={"init_from": parent.ref}))


def test_what_is_not_there_or_was_changed_is_one_error_before_the_base_is_loaded(recipe, parent, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.runs.run.base_of", None)
    with pytest.raises(TrainingError, match="adapter.init_from: testing/nothing: "):
        train(recipe(adapter={"init_from": "testing/nothing"}))
    with pytest.raises(TrainingError, match="adapter.init_from: no folder: 'no folder' is not an adapter reference"):
        train(recipe(adapter={"init_from": "no folder"}))
    (parent.adapter / WEIGHTS).write_bytes(b"x")
    with pytest.raises(TrainingError, match="adapter.init_from: .*must be the file that the manifest lists"):
        train(recipe(adapter={"init_from": str(parent.adapter)}))


def test_a_run_that_began_afresh_does_not_go_on_from_an_adapter(recipe, parent):
    options = {"adapter": {"publish": None}, "train": {"save_steps": 1}}
    (train(recipe(**options)).folder / "result.json").unlink()  # as if it had not come to its end
    with pytest.raises(TrainingError, match="init_from was None and is now 'testing/squares@sha256:.*'"):
        train(recipe(**{**options, "adapter": {"publish": None, "init_from": parent.ref}}))


def test_another_parent_is_another_run(recipe, parent, monkeypatch):
    child = recipe(adapter={"init_from": "testing/squares"}, train={"save_steps": 1})
    folder = train(child).folder
    (folder / "result.json").unlink()  # as if it had not come to its end
    with pytest.raises(
        TrainingError, match="init_from was 'testing/squares@sha256:.* and is now 'testing/squares@sha256"
    ):
        train(child)
    (folder / "result.json").write_text("{}")
    with pytest.raises(TrainingError, match="adapter.init_from was 'testing/squares' and is now 'testing/squares@1'"):
        train(recipe(adapter={"init_from": parent.ref}, train={"save_steps": 1}))

"""Any other class: towers found by their names, or an error that lists what there is; what cannot go together."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Mistral3Config

from finetune import plugins
from finetune.assemble.loading import load_base
from finetune.errors import ModelError, RecipeError
from finetune.families.base import family_of
from finetune.families.generic import GenericFamily
from tests.matrix import METHODS, recipe_of, reload_cell, train_cell
from tests.tiny import FAMILIES as TINY


def test_the_generic_path_finds_the_towers_of_known_families(tiny_family):
    known = family_of(str(tiny_family))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tiny_family))
    found, wanted = GenericFamily(known.model_type).towers(model), known.towers(model)
    assert found["language"] == wanted["language"]
    assert set(found["vision"]) >= set(wanted["vision"])
    assert set(found["projector"]) & set(wanted["projector"])


def test_a_class_without_a_family_of_its_own_goes_the_whole_way(tmp_path, monkeypatch):
    base = TINY["llava"](tmp_path / "base")
    monkeypatch.setitem(plugins._TABLES, "families", {})
    assert isinstance(family_of(str(base)), GenericFamily)
    (tmp_path / "run").mkdir()
    found = reload_cell(train_cell(base, METHODS["lora"], tmp_path / "run"))
    assert found["reloaded"] and found["merged_off"] < 1e-5


def test_a_model_whose_towers_cannot_be_found_lists_what_it_has():
    class Strange(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.ModuleDict({"eye": torch.nn.Linear(1, 1), "tongue": torch.nn.Linear(1, 1)})

    with pytest.raises(
        ModelError, match="must have a language tower named language_model, .* Its parts are: model.eye, model.tongue"
    ):
        GenericFamily("strange").towers(Strange())


def test_transformers_classes_without_a_family_are_taken_up(tmp_path):
    Mistral3Config().save_pretrained(tmp_path)
    assert family_of(str(tmp_path)).model_type == "mistral3"


def test_a_pair_that_cannot_work_is_refused_when_the_recipe_is_read(tmp_path):
    base = TINY["gemma3"](tmp_path / "gemma3")
    with pytest.raises(
        RecipeError, match="lora.towers.projector cannot be used with gemma3: .* add {name: full_modules"
    ):
        recipe_of(METHODS["lora-projector"], base, tmp_path)
    with pytest.raises(RecipeError, match="a method must be unique, but '[a-z]+' is given twice"):
        recipe_of([METHODS["lora"], METHODS["dora"]], base, tmp_path)


def test_the_error_of_a_missing_base_names_the_download():
    with pytest.raises(ModelError, match="run `hf download some/model --revision v1 --local-dir FOLDER`"):
        load_base("some/model", revision="v1")
    with pytest.raises(ModelError) as error:
        load_base("pockt")
    assert "hf download" not in str(error.value)

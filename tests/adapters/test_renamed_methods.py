"""Adapters whose files name a method as an earlier revision did."""

import json

import pytest

from finetune.adapters.folder import read_folder
from finetune.adapters.manifest import CONFIG_NAME, MANIFEST_NAME
from finetune.adapters.manifest_schema_2 import summary_from_schema_2
from finetune.core import old_names
from finetune.registry import AdapterRegistry
from finetune.tables import METHODS
from tests.regression.nets import NETS


def test_each_old_name_has_a_method_now():
    assert set(old_names.METHODS.values()) <= set(METHODS) and not set(old_names.METHODS) & set(METHODS)


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_a_saved_adapter_has_the_present_name(net):
    folder = net / "adapters" / "method-lora-plus-prompt-plus-projector"
    for name in (MANIFEST_NAME, CONFIG_NAME):
        assert '"overrides"' in (folder / name).read_text(encoding="utf-8")
    manifest = read_folder(folder).manifest
    assert sorted(part.method for part in manifest.adapter.parts) == ["full_modules", "lora", "prompt_tuning"]
    assert "full_modules" in manifest.adapter.methods and "overrides" not in json.dumps(manifest.model_dump())


def test_a_list_of_a_saved_registry_has_the_present_names():
    methods = {entry.summary["method"] for net in NETS for entry in AdapterRegistry(net / "registry").list()}
    assert any("full_modules" in method for method in methods) and not any("overrides" in method for method in methods)


def test_a_summary_of_other_methods_is_unchanged():
    assert summary_from_schema_2({"method": "lora+theirs", "domain": "d"}) == {"method": "lora+theirs", "domain": "d"}

"""``finetune registry warm``: later loads find a receipt, and a mistake is answered before anything is loaded."""

import json

import pytest

from finetune.assemble.base import Base
from finetune.assemble.loading import load_base
from finetune.cli import main
from finetune.registry import AdapterRegistry
from finetune.serving.loading import load
from tests.serving.adapters import make_adapter


@pytest.fixture(scope="module")
def folders(tiny_fast_vlm, tmp_path_factory):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    return [make_adapter(base, "lora", tmp_path_factory.mktemp(name), seed=i, name=name) for i, name in enumerate("ab")]


@pytest.fixture
def refs(folders):
    return [AdapterRegistry().publish(folder, aliases=["prod"]).full_name + "@prod" for folder in folders]


def test_later_loads_do_not_probe(refs, tiny_fast_vlm, monkeypatch, capsys):
    on_base = {"base": str(tiny_fast_vlm), "device": "cpu"}
    assert main(["registry", "warm", *refs, "--base", str(tiny_fast_vlm), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "testing/a@1: passed, its effect differs by 0.00%",
        "testing/b@1: passed, its effect differs by 0.00%",
    ]
    monkeypatch.setattr(Base, "probe", None)
    for ref in refs:
        assert load(ref, **on_base).adapter.probe.verdict == "passed"


def test_json_has_the_verdicts(refs, tiny_fast_vlm, capsys):
    words = ["registry", "warm", refs[0], refs[0], "--base", str(tiny_fast_vlm), "--device", "cpu", "--json"]
    assert main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["ref"], found["version"], found["verdict"]) == (refs[0], "testing/a@1", "passed")


def test_a_mistake_is_answered_before_a_base_is_loaded(refs, monkeypatch, capsys):
    monkeypatch.setattr("finetune.serving.loading.load", None)
    assert main(["registry", "warm", *refs, "testing/none", "--base", "pocket"]) == 2
    assert "no adapter 'testing/none'" in capsys.readouterr().err
    assert main(["registry", "warm", *refs, "--base", "pockt"]) == 2
    assert "Did you mean 'pocket'?" in capsys.readouterr().err

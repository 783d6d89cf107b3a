"""The benchmark of swaps on a model of a few layers: what it writes, and that it would notice another result."""

import json

import pytest
import torch

from benchmarks.measure import BenchmarkError
from benchmarks.swap import check_equal, figures, main, table


def test_every_figure_is_measured_on_both_sides(tmp_path, capsys):
    file = tmp_path / "swap.json"
    with pytest.MonkeyPatch.context() as patch:  # the benchmark has places of its own
        patch.setenv("FINETUNE_CACHE", "")
        patch.setenv("FINETUNE_REGISTRY", "")
        few = ["--loaded", "1,3", "--rounds", "2", "--mixed-rounds", "2", "--new-tokens", "3", "--probes", "1"]
        assert main(["--model", "tiny", *few, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    details = found.pop("details")
    assert set(found) == {"switch_ms_1", "switch_ms_3", "switch_growth", "switch_vs_peft", "cold_vs_floor",
                          "cold_vs_peft", "cold_with_probe_ms", "mixed_vs_separate", "mixed_vs_peft",
                          "mixed_vs_separate_images", "mixed_vs_peft_images"}  # fmt: skip
    assert all(value > 0 for value in found.values())
    for what, who in (("switching", {"ours", "peft", "ours_loaded", "ours_forward", "peft_forward", "base_forward"}),
                      ("loading", {"ours", "peft", "floor"})):  # fmt: skip
        assert set(details[what]) == {"1", "3"}
        for times in details[what].values():
            assert set(times) == who and all(len(each) == 2 and min(each) > 0 for each in times.values())
    assert len(details["with_probe"]) == 1
    for rows in ("questions", "images"):
        rounds = {who: len(times) for who, times in details["mixing"][rows].items()}
        assert rounds == {"mixed": 2, "separate": 2, "peft": 2}
    shown = capsys.readouterr().out
    assert "3 loaded" in shown and "cold_vs_peft" in shown


def test_figures_are_ratios_of_medians_and_the_worst_counts():
    def switching(ours, peft):
        return {"ours": [ours, ours, 9.0], "peft": [peft, peft, 0.0], "ours_forward": [1.0]}

    def loading(ours):
        return {"ours": [ours], "peft": [1.0], "floor": [0.01]}

    measured = {1: switching(0.001, 0.02), 8: switching(0.0012, 0.06)}, {1: loading(0.015), 8: loading(0.02)}
    mixing = {rows: {"mixed": [2.0, 2.0, 9.0], "separate": [5.0], "peft": [3.0]} for rows in ("questions", "images")}
    found = figures(*measured, [5.0, 6.0, 60.0], mixing)
    assert found == pytest.approx(
        {"switch_ms_1": 1.0, "switch_ms_8": 1.2, "switch_growth": 1.2, "switch_vs_peft": 20.0, "cold_vs_floor": 2.0,
         "cold_vs_peft": 50.0, "cold_with_probe_ms": 6000.0, "mixed_vs_separate": 2.5, "mixed_vs_peft": 1.5,
         "mixed_vs_separate_images": 2.5, "mixed_vs_peft_images": 1.5}
    )  # fmt: skip
    shown = table({"switch_vs_peft": 19.0, "cold_vs_floor": 1.9, "other": 1.0}, *measured, mixing)
    assert ">= 20: no" in shown and "<= 2: yes" in shown


def test_two_that_do_not_compute_the_same_are_not_compared(tiny_base, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from finetune.assemble.loading import load_base
    from finetune.serving.vision_language_model import VisionLanguageModel
    from tests.serving.adapters import make_adapter

    base = load_base(str(tiny_base), device="cpu")
    vlm = VisionLanguageModel(base)
    adapters = SimpleNamespace(refs=[make_adapter(base, "lora", tmp_path / "lora")])
    plain = load_base(str(tiny_base), device="cpu").model
    with pytest.raises(BenchmarkError, match="must have an effect, and the same one as in PEFT"):
        check_equal(vlm, plain, adapters)
    with vlm.using(adapters.refs[0]), torch.inference_mode():
        logits = vlm.model(input_ids=torch.tensor([[5]]), use_cache=False).logits
    check_equal(vlm, lambda **inputs: SimpleNamespace(logits=logits), adapters)

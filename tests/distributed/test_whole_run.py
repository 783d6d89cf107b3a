"""Whole runs over several processes, from the recipe to the published adapter."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import ROOT, TORCHRUN, environment

CONFIG = "recipes/configs/retail/products.yaml"
FEW = ["data.rows={train: 18, val: 3, test: 5}", "train.epochs=2", "train.eval_steps=2", "train.learning_rate=1e-4"]
TRAIN = "recipes/train.py"
TWO = (*TORCHRUN, "--standalone", "--nproc_per_node", "2")


def run(folder, launcher, script, batch_size, *more, env=None):
    """Return the run's folder."""
    out = subprocess.run(
        [sys.executable, *launcher, script, CONFIG, *FEW, f"train.batch_size={batch_size}",
         f"train.output_dir={folder}", *more],
        env=env or environment(), cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-6000:]
    return folder / "products"


def assert_same(one, two, within=1e-5):
    for name in ("last", "adapter"):
        whole, other = (load_file(folder / name / "adapter_model.safetensors") for folder in (one, two))
        assert whole.keys() == other.keys()
        assert max((whole[key] - other[key]).abs().max().item() for key in whole) < within
    answers = [
        [(folder / f"predictions-{who}.jsonl").read_text() for who in ("base", "adapter")] for folder in (one, two)
    ]
    assert answers[0] == answers[1], "every row is answered once, and the same"
    metrics = [json.loads((folder / "adapter" / "manifest.json").read_text())["metrics"] for folder in (one, two)]
    assert metrics[0] == metrics[1] and metrics[0]["test"]["n"] == 5
    losses = [
        [
            line["val.loss"]
            for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            if "val.loss" in line
        ]
        for folder in (one, two)
    ]
    assert losses[0] and losses[0] == pytest.approx(losses[1], abs=10 * within)


@pytest.mark.distributed
def test_a_run_over_a_shared_base_ends_in_the_same_adapter(tmp_path):
    """Judged before and after, validated, checkpointed, saved, probed and published; then loaded like any other."""
    from finetune.serving.loading import load

    one = run(tmp_path / "one", (), TRAIN, 8)
    whole = run(tmp_path / "whole", TWO, TRAIN, 4)
    shared = run(tmp_path / "shared", TWO, "tests/distributed/train_shared.py", 4)
    assert_same(one, whole)
    assert_same(one, shared)
    vlm = load(shared / "adapter", base="pocket", device="cpu")
    assert vlm.adapter.probe.verdict in ("passed", "inconclusive")
    (checkpoint,) = list((shared / "checkpoints").iterdir())[-1:]
    held = {key.partition("/")[0] for key in load_file(checkpoint / "state.safetensors")}
    assert held == {"adapter", "best", "optimizer", "random"}


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_a_run_on_gpus_ends_in_the_same_adapter(strategy, tmp_path):
    if strategy.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs pip install deepspeed")
    number = min(2, torch.cuda.device_count())
    if not number:
        pytest.skip("needs a GPU")
    if strategy == "ddp" and number < 2:
        pytest.skip("needs two GPUs")
    common = {**os.environ, "PYTHONPATH": str(ROOT)}
    one = run(tmp_path / "one", (), TRAIN, 8, env={**common, "CUDA_VISIBLE_DEVICES": "0"})
    file = f"recipes/accelerate/{strategy}.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(number))
    env = {**common, "FINETUNE_NUM_PROCESSES": str(number)}
    # Kernels differ between batches of 8 and of 4.
    assert_same(one, run(tmp_path / "shared", launcher, TRAIN, 8 // number, env=env), within=1e-4)

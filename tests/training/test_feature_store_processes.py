"""The feature store of several processes: shared, killed while it is filled, on several hosts, and with an error."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from finetune.training.feature_store import is_whole
from tests.training.test_feature_store import LANGUAGE, ROWS

ROOT = str(Path(__file__).parents[2])


def written(recipe, folder):
    """Write a recipe that scripts can read; return it and its file."""
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    return recipe, config


FILL = """
import sys, time
from finetune.training import feature_store
from finetune.recipe import load_recipe
from finetune.runs.train import train
put = feature_store.FeatureStore.put
def slow(self, path, features):
    time.sleep(0.05)
    return put(self, path, features)
feature_store.FeatureStore.put = slow
train(load_recipe(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.distributed
def test_two_runs_fill_one_store_and_a_killed_one_leaves_nothing_half(make_recipe, tiny_fast_vlm, tmp_path):
    epoch = {"max_steps": 5}  # which reads all rows
    recipe = make_recipe(tiny_fast_vlm, method=LANGUAGE, train=epoch, adapter={"publish": None})
    recipe, config = written(recipe, tmp_path)
    env = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    root = tmp_path / "cache" / "features"

    def start(name):
        command = [sys.executable, "-c", FILL, str(config), f"name={name}"]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    killed = start("killed")
    while len(list(root.rglob("*.features"))) < 5:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = sorted(root.rglob("*.features"))
    assert all(map(is_whole, before)) and 5 <= len(before) < ROWS
    both = [start(name) for name in ("one", "two")]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    files = sorted(root.rglob("*.features"))
    assert len(files) == ROWS and all(map(is_whole, files))
    logs = [(recipe.run_folder.parent / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[json.loads(line).get("loss") for line in log] for log in logs]
    assert losses[0] == losses[1] and any(losses[0])


SEPARATE_HOSTS = """
import os, shutil, sys
cache = os.environ["FINETUNE_CACHE"]
os.environ["FINETUNE_CACHE"] = cache + os.environ["RANK"]  # as if each process had a disk of its own
root = sys.argv[2] + os.environ["RANK"]  # with images of its own, too
shutil.copytree(sys.argv[2], root)
os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = "0", "1"
from finetune.recipe import load_recipe
from finetune.runs.train import train
train(load_recipe(sys.argv[1], [f"data.root={root}", *sys.argv[3:]]))
"""


@pytest.mark.distributed
def test_two_processes_share_the_filling_on_one_disk_or_on_two(make_recipe, tiny_fast_vlm, tmp_path):
    changes = {"method": LANGUAGE, "train": {"batch_size": 4, "max_steps": 5}, "adapter": {"publish": None}}
    recipe, config = written(make_recipe(tiny_fast_vlm, **changes), tmp_path)
    (tmp_path / "apart.py").write_text(SEPARATE_HOSTS)
    script = str(Path(ROOT) / "recipes" / "train.py")
    weights = {}
    for name, command in {
        "one": [script, str(config)],
        "two": ["-m", "torch.distributed.run", "--nproc_per_node", "2", script, str(config), "train.batch_size=2"],
        "apart": ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "apart.py"), str(config),
                  str(recipe.data.root), "train.batch_size=2"],
    }.items():  # fmt: skip
        cache = tmp_path / f"cache-{name}-"
        done = subprocess.run(
            [sys.executable, *command, f"name={name}"],
            env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
                 "FINETUNE_CACHE": str(cache)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        new = {"one": ROWS, "two": ROWS, "apart": 2 * ROWS}[name]
        assert f"the images of {ROWS} rows, {new} of them new" in done.stdout
        disks = [f"{cache}0", f"{cache}1"] if name == "apart" else [cache]
        assert [len(list(Path(disk).rglob("*.features"))) for disk in disks] == [ROWS] * len(disks)
        folder = recipe.run_folder.parent / name
        weights[name] = load_file(folder / "last" / "adapter_model.safetensors")
    for name in ("two", "apart"):
        for key, tensor in weights["one"].items():
            assert torch.allclose(tensor, weights[name][key], atol=1e-5), (name, key)


BROKEN = """
import os, sys
from finetune.errors import RowError
from finetune.recipe import load_recipe
from finetune.runs.train import train
from finetune.training import filling
if os.environ["RANK"] == "1":
    def share(self, *args, **kwargs):
        raise RowError("row 7: its image cannot be opened")
    filling._Share.store = share
train(load_recipe(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.distributed
def test_no_process_waits_for_one_that_cannot_go_on(make_recipe, tiny_fast_vlm, tmp_path):
    _, config = written(make_recipe(tiny_fast_vlm, method=LANGUAGE, adapter={"publish": None}), tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "broken.py"),
         str(config)],
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "TrainingError: process 1: row 7: its image cannot be opened" in done.stderr

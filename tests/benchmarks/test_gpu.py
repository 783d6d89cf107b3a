"""Each part of benchmarks/gpu.sh on the CPU with models of a few layers, so that no slip costs the day with a GPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.gpu import PARTS, ROOT
from benchmarks.gpu_results import main as add_result

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def test_the_script_and_the_module_have_the_same_parts_in_at_most_8_minutes():
    text = SCRIPT.read_text()
    budgets = dict(pair.split(":") for pair in re.search("^parts='(.*)'$", text, re.MULTILINE)[1].split())
    assert list(budgets) == list(PARTS)
    install, total = map(int, re.search(r"install_seconds=(\d+) total_seconds=(\d+)", text).groups())
    assert sum(map(int, budgets.values())) + install == total == 8 * 60


def test_a_part_that_fails_stands_in_the_file_beside_the_others(tmp_path):
    (tmp_path / "use.json").write_text('{"train_seconds": 2.0}')
    (tmp_path / "qwen.log").write_text("CUDA error")
    for part, code in (("qwen", 1), ("use", 0), ("smolvlm", 124)):
        words = [str(tmp_path), "--device", "cpu", "--part", part, "--exit-code", str(code)]
        assert add_result(words) == 0
    (file,) = tmp_path.glob("*-gpu.json")
    found = json.loads(file.read_text())
    assert found.pop("details")["machine"]["versions"]["torch"]
    assert found == {
        "qwen": {"failed": "exit code 1", "log": "CUDA error"},
        "use": {"train_seconds": 2.0},
        "smolvlm": {"failed": "took too long", "log": ""},
    }


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_dry_run_of_each_part(tmp_path, part):
    command = ["bash", str(SCRIPT), "--dry-run", "--out", str(tmp_path), "--only", part]
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(command, env=env | {"PYTHON": sys.executable}, capture_output=True, text=True)
    log = (tmp_path / f"{part}.log").read_text()
    assert done.returncode == 0, done.stdout + log
    (file,) = tmp_path.glob("*-gpu.json")
    found = json.loads(file.read_text())[part]
    assert "failed" not in json.dumps(found), found
    if part in ("qwen", "smolvlm"):
        (model,) = found["details"]["models"].values()
        wanted = {"ours", "bare", "trl", *(["stored"] if part == "smolvlm" else [])}
        assert set(model["contestants"]) == wanted - (set() if importlib.util.find_spec("trl") else {"trl"})
    elif part == "use":
        assert found["ask"]["answer"] and found["serve"]["answer"]
    elif part == "marked":
        assert any("test_a_batch_for_a_gpu_comes_pinned" in line for line in found["tests"])

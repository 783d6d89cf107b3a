"""A command that answers imports what it needs: nothing of training, and nothing of quantization."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from finetune.assemble.loading import load_base
from tests.serving.adapters import make_adapter

ROOT = Path(__file__).parents[2]
# Prints the exit code, the modules that an answer must do without, and our modules that hold a part of accelerate.
# transformers' own modeling_utils imports accelerate wherever it is installed, so it cannot be absent.
ASK = """
import json, sys
from finetune.cli import main
code = main(sys.argv[1:])
unwanted = {"bitsandbytes", "datasets", "peft", "torch._inductor.compile_fx"} & sys.modules.keys()
def is_of_accelerate(part):
    return str(getattr(part, "__module__", "")).startswith("accelerate")
ours = {name: module for name, module in sys.modules.items() if name.startswith("finetune")}
holders = [name for name, module in ours.items() if any(map(is_of_accelerate, vars(module).values()))]
print(json.dumps([code, sorted(unwanted), holders]))
"""


@pytest.mark.parametrize("kind", ["dora", "everything"])
def test_ask_imports_nothing_that_only_training_needs(kind, tiny_fast_vlm, tmp_path):
    folder = make_adapter(load_base(str(tiny_fast_vlm), device="cpu"), kind, tmp_path / kind)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    words = ["ask", str(folder), str(tmp_path / "a.png"), "What?", "--base", str(tiny_fast_vlm), "--device", "cpu"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ASK, *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, [], []], done.stderr

"""llama.cpp itself, with the exported adapter on the language model of its base, says what ours says.

`tests/servers/llama_cpp.sh` builds an environment with llama.cpp in it and runs these tests.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from finetune.assemble.loading import load_base
from finetune.export.exporting import export_adapter
from finetune.serving.loading import load
from tests.export.gguf_base import GEMMA3, GROUPED, save_tiny, write_base
from tests.serving.adapters import make_adapter

CASES = {
    "fast_vlm": {},
    "gemma3": GEMMA3,
    "idefics3": {},
    "internvl": {},
    "llava": {},
    "llava grouped": GROUPED,
    "llava_onevision": {},
    "qwen2_5_vl": {},
    "qwen3_vl": {},
    "smolvlm": {},
}
TOKENS = [11, 25, 7, 60, 33, 90, 14, 55]
# In nats. Gemma and Qwen-VL are off by a thousandth or two, the base alone as much as with an adapter: llama.cpp looks
# GELU up in a table in half precision, and has positions in three dimensions by a kernel of their own.
TOLERANCE = 0.01


@pytest.fixture
def engine():
    python = os.environ.get("FINETUNE_LLAMA_CPP")
    if not python:
        pytest.skip("no llama.cpp here: tests/servers/llama_cpp.sh installs it and runs these tests")
    return python


def ask(engine, base, adapter, size):
    """The log probabilities of the next token, [V]; ids that llama.cpp does not tell of are left out."""
    script = Path(__file__).with_name("ask_llama_cpp.py")
    command = [engine, str(script), str(base), str(adapter), ",".join(map(str, TOKENS)), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    found = json.loads(line.removeprefix("ANSWER "))
    assert len(found) >= size - 1
    return torch.tensor([found.get(str(token), torch.nan) for token in range(size)])


def ours(vlm):
    with torch.inference_mode():
        ids = torch.tensor([TOKENS])
        return vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].log_softmax(-1)


def off(got, wanted):
    return (got - wanted)[~got.isnan()].abs().max().item()


@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["lora", "wide lora"])
def test_llama_cpp_answers_as_the_adapter_does(engine, tmp_path, case, kind):
    base = save_tiny(case.split()[0], tmp_path / "base", **CASES[case])
    live = load_base(str(base), device="cpu")
    write_base(live, tmp_path / "base.gguf")
    adapter = make_adapter(live, kind, tmp_path / "adapter")
    export_adapter(adapter, to="gguf", output=tmp_path / "out", base=str(base))
    vlm = load(adapter, base=str(base), device="cpu")
    adapted = ours(vlm)
    with vlm.using(None):
        plain = ours(vlm)
    base_off = off(ask(engine, tmp_path / "base.gguf", "-", len(plain)), plain)
    adapter_off = off(ask(engine, tmp_path / "base.gguf", tmp_path / "out" / "adapter.gguf", len(plain)), adapted)
    effect = off(adapted, plain)
    print(f"\n{case}, {kind}: base {base_off:.1e}, with the adapter {adapter_off:.1e}, its effect {effect:.1f}")
    assert max(base_off, adapter_off) < TOLERANCE < 0.5 < effect

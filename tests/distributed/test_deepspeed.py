"""DeepSpeed itself, on the CPU: ZeRO-2 and ZeRO-3 end where one process with the whole base does.

Skipped where DeepSpeed is not installed, as the project does not ask for it: ``pip install deepspeed``.
"""

import importlib.util

import pytest
import torch

from tests.distributed.test_exact import BOTH_TOWERS, ROWS, STEPS, TOTAL_BATCH_SIZE, farthest, off
from tests.matrix import LORA

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed"),
]

TRAINED = {
    "lora": {"method": LORA, "answers": 5},
    "lora in both towers": {"method": BOTH_TOWERS},
    "near the base": {"method": BOTH_TOWERS, "near": 2.0},
}
# (what is trained, stage, rows of a micro-batch, micro-batches, more)
RUNS = [
    ("lora", "zero2", 2, 2, {}),
    ("lora", "zero2", 2, 2, {"stop": 1}),
    ("lora in both towers", "zero2", 1, 4, {}),
    ("lora", "zero3", 2, 2, {}),
    ("lora", "zero3", 2, 2, {"stop": 1, "checkpointing": True}),
    ("near the base", "zero2", 1, 4, {}),
    ("near the base", "zero3", 2, 2, {"checkpointing": True}),
]


@pytest.fixture(scope="module")
def found(processes, bases):
    """What one process came to, by what it trained; and what each of two came to in each run."""
    common = {"base": bases("idefics3"), "rows": ROWS, "uneven": True, "steps": STEPS}
    (whole,) = processes([{**common, **trained, "batch_size": TOTAL_BATCH_SIZE} for trained in TRAINED.values()], 1)
    scenarios = [
        {**common, **TRAINED[trained], "strategy": stage, "batch_size": rows, "accumulation": number, **more}
        for trained, stage, rows, number, more in RUNS
    ]
    two = processes(scenarios, 2, DS_ACCELERATOR="cpu")
    return dict(zip(TRAINED, whole, strict=True)), {str(r): [rank[i] for rank in two] for i, r in enumerate(RUNS)}


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_an_engine_ends_where_one_process_does(found, run):
    """A run that was stopped after a step goes on from its checkpoint, so its end says that all of it was put back."""
    one, two = found
    whole, ranks = one[run[0]], two[str(run)]
    for rank in ranks:
        if "stop" not in run[4]:
            assert off(whole["gradients"], {n: rank["gradients"][n] for n in whole["gradients"]}) < 1e-5
        assert farthest(whole["weights"], rank["weights"]) < 1e-5
        assert rank["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert rank.get("answers") == whole.get("answers")
    held = {key.removeprefix("adapter/"): t for key, t in ranks[0]["checkpoint"].items() if key.startswith("adapter/")}
    assert held.keys() == whole["weights"].keys()
    assert all(torch.equal(held[name], weight) for name, weight in ranks[0]["weights"].items())

"""An objective that asks for the base's own outputs, over processes: the same gradients and adapter as in one."""

import pytest

from tests.distributed.test_exact import BOTH_TOWERS, EVERYTHING, FSDP2, ROWS, STEPS, TOTAL_BATCH_SIZE, farthest, off

pytestmark = pytest.mark.distributed

TRAINED = {
    "lora": {"method": BOTH_TOWERS},
    "prompt and full modules": {"method": EVERYTHING},
}
# (what is trained, rows of a micro-batch, micro-batches, more) of two processes
SPLITS = [
    ("lora", 4, 1, {}),
    ("lora", 1, 4, {"checkpointing": True}),
    ("lora", 2, 2, FSDP2),
    ("prompt and full modules", 2, 2, {}),
    ("prompt and full modules", 1, 4, FSDP2),
]


@pytest.fixture(scope="module")
def found(processes, bases):
    common = {"base": bases("idefics3"), "rows": ROWS, "uneven": True, "steps": STEPS, "near": 2.0}
    whole = [{**common, **trained, "batch_size": TOTAL_BATCH_SIZE} for trained in TRAINED.values()]
    (one,) = processes([*whole, {**whole[0], "near": 0}], 1)
    split = [{**common, **TRAINED[s[0]], "batch_size": s[1], "accumulation": s[2], **s[3]} for s in SPLITS]
    two = processes(split, 2)
    by_split = {str(s): [rank[i] for rank in two] for i, s in enumerate(SPLITS)}
    return {"whole": dict(zip(TRAINED, one, strict=False)), "without": one[-1], **by_split}


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_split_gives_the_same(found, split):
    whole = found["whole"][split[0]]
    for rank in found[str(split)]:
        assert off(whole["gradients"], rank["gradients"]) < 1e-5, "fp32 sums in another order"
        assert farthest(whole["weights"], rank["weights"]) < 1e-5
        assert rank["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert (whole["probe"] - rank["probe"]).abs().max() < 1e-4


def test_the_objective_has_a_part_in_it(found):
    assert off(found["without"]["gradients"], found["whole"]["lora"]["gradients"]) > 1e-3

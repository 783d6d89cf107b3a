"""One process or two, one micro-batch or several, a whole base or a shared one: the same gradients and adapter.

Every scenario below sees steps of 8 of 11 rows, so that the second step of an epoch holds 3, with answers of very
different lengths.
"""

from collections import Counter

import pytest
import torch

from finetune.tables import FAMILIES
from finetune.training.plan import Plan
from tests.matrix import LORA, PROMPT

pytestmark = pytest.mark.distributed

BOTH_TOWERS = {**LORA, "towers": {"language": "all-linear", "vision": "all-linear"}}
VISION = {**LORA, "towers": {"language": "none", "projector": "none", "vision": "all-linear"}}
EVERYTHING = [LORA, PROMPT, {"name": "full_modules", "parameters": ["projector", "norms"]}]
ROWS, TOTAL_BATCH_SIZE, STEPS = 11, 8, 3
BLIND = [1, 4, 5, 8]  # rows without an image
FSDP2 = {"strategy": "fsdp2"}

# What is trained; each is run once by one process with the whole step in one batch, and compared with its splits
TRAINED = {
    "lora": {"method": LORA},
    "no images in some rows": {"method": BOTH_TOWERS, "blind": BLIND},
    "vision only, no images in some rows": {"method": VISION, "blind": BLIND},
    "prompt and full modules": {"method": EVERYTHING, "answers": 9},
}
# (what is trained, processes, rows of a micro-batch, micro-batches, more)
SPLITS = [
    ("lora", 1, 2, 4, {}),
    ("lora", 1, 1, 8, {"checkpointing": True}),
    ("lora", 2, 4, 1, {}),
    ("lora", 2, 1, 4, {}),
    ("lora", 2, 2, 2, FSDP2),
    ("no images in some rows", 1, 1, 8, {}),
    ("no images in some rows", 2, 1, 4, {"checkpointing": True}),
    ("no images in some rows", 2, 1, 4, FSDP2),
    ("no images in some rows", 2, 2, 2, {**FSDP2, "checkpointing": True}),
    ("vision only, no images in some rows", 2, 1, 4, {}),
    ("vision only, no images in some rows", 2, 1, 4, FSDP2),
    ("prompt and full modules", 2, 4, 1, {}),
    ("prompt and full modules", 2, 2, 2, FSDP2),
]
DROPOUT = {"method": {**LORA, "lora_dropout": 0.3}, "batch_size": 2, "accumulation": 2, **FSDP2}


def scenario(base, trained, batch_size, accumulation=1, **more):
    common = {"base": base, "rows": ROWS, "uneven": True, "steps": STEPS}
    return {**common, **trained, "batch_size": batch_size, "accumulation": accumulation, **more}


@pytest.fixture(scope="module")
def found(processes, bases):
    """(what is trained, processes, batch size, accumulation, more) -> what each process came to; three launches."""
    base = bases("idefics3")
    whole = [scenario(base, trained, TOTAL_BATCH_SIZE) for trained in TRAINED.values()]
    alone = [split for split in SPLITS if split[1] == 1]
    (one,) = processes([*whole, *(scenario(base, TRAINED[s[0]], s[2], s[3], **s[4]) for s in alone)], 1)
    on_two = [split for split in SPLITS if split[1] == 2]
    resumed = [scenario(base, DROPOUT, 2, 2), scenario(base, DROPOUT, 2, 2, stop=1)]
    halves = [
        scenario(base, TRAINED["prompt and full modules"], 2, 2, dtype="bfloat16", **more) for more in ({}, FSDP2)
    ]
    others = [scenario(bases(f), {"method": LORA}, 4, **FSDP2) for f in FAMILIES]
    two = processes(
        [*(scenario(base, TRAINED[s[0]], s[2], s[3], **s[4]) for s in on_two), *resumed, *halves, *others], 2
    )
    (plain,) = processes([scenario(bases(f), {"method": LORA}, TOTAL_BATCH_SIZE) for f in FAMILIES], 1)
    by_split = {str(s): [one[len(whole) + i]] for i, s in enumerate(alone)}
    by_split |= {str(s): [rank[i] for rank in two] for i, s in enumerate(on_two)}
    rest = [rank[len(on_two) :] for rank in two]
    families = {f: (plain[i], [rank[4 + i] for rank in rest]) for i, f in enumerate(FAMILIES)}
    return {"whole": dict(zip(TRAINED, one, strict=False)), "others": rest, "families": families, **by_split}


def off(there, here):
    """The distance between two sets of tensors, relative to the first."""
    assert there.keys() == here.keys()
    one, two = (torch.cat([tensors[name].flatten() for name in there]) for tensors in (there, here))
    return ((one - two).norm() / one.norm()).item()


def farthest(there, here):
    assert there.keys() == here.keys()
    return max((there[name] - here[name]).abs().max().item() for name in there)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_split_of_a_step_gives_the_same(found, split):
    whole = found["whole"][split[0]]
    for rank in found[str(split)]:
        assert off(whole["gradients"], rank["gradients"]) < 1e-5, "fp32 sums in another order"
        assert farthest(whole["weights"], rank["weights"]) < 1e-5
        assert rank["losses"] == pytest.approx(whole["losses"], rel=1e-5)


def test_the_rows_make_a_process_meet_a_step_half_without_images():
    """Or a hang would not be looked for."""
    plan = Plan(
        num_rows=ROWS,
        shuffled=True,
        total_batch_size=TOTAL_BATCH_SIZE,
        batch_size=1,
        num_processes=2,
        total_steps=STEPS,
        seed=0,
    )
    pairs = [zip(*(plan.micro_batches(step, process) for process in (0, 1)), strict=True) for step in range(STEPS)]
    differ = [(a[0].row in BLIND) != (b[0].row in BLIND) for pair in pairs for a, b in pair]
    assert any(differ)


@pytest.mark.parametrize("split", [split for split in SPLITS if split[0] == "prompt and full modules"], ids=str)
def test_every_row_is_answered_once(found, split):
    """9 rows in batches of 2: five rows on one process and four on the other."""
    ranks = found[str(split)]
    assert all(rank["answers"] == found["whole"][split[0]]["answers"] for rank in ranks)
    assert len(ranks[0]["answers"]) == 9
    times = Counter(ranks[0]["asked"])
    assert times.keys() == set(map(str, range(9)))
    # With a sharded base, the process with four rows answers one more for company. Else each process answers two rows
    # thrice: it compares its way with ``generate``.
    assert sorted(times.values()) == ([1] * 8 + [2] if split[4] == FSDP2 else [1] * 5 + [3] * 4)


def test_a_process_holds_half_of_what_is_cut(found):
    whole, ranks = found["whole"]["lora"], found[str(("lora", 2, 2, 2, FSDP2))]
    cut = 2 * (4 * 64 * 64 + 3 * 64 * 64)  # two layers of attention and MLP matrices
    assert [rank["held"] for rank in ranks] == [whole["held"] - cut // 2] * 2


@pytest.mark.parametrize("split", [split for split in SPLITS if split[4].get("strategy")], ids=str)
def test_a_checkpoint_holds_the_whole_adapter_and_nothing_of_the_base(found, split):
    main, other = found[str(split)]
    held = {key.removeprefix("adapter/"): t for key, t in main["checkpoint"].items() if key.startswith("adapter/")}
    assert all(torch.equal(held[name], weight) for name, weight in main["weights"].items()) and len(held) > 0
    parts = {key.partition("/")[0] for key in main["checkpoint"]}
    assert parts == {"adapter", "optimizer", "random"}
    slots = {name: main["checkpoint"][f"optimizer/{name}/exp_avg"].shape for name in held}
    assert slots == {name: weight.shape for name, weight in main["weights"].items()}
    assert all(torch.equal(other["weights"][name], weight) for name, weight in main["weights"].items())


def test_a_shared_run_goes_on_exactly(found):
    for uninterrupted, resumed, *_ in found["others"]:
        assert farthest(uninterrupted["weights"], resumed["weights"]) == 0
        assert resumed["losses"] == uninterrupted["losses"]


def test_a_base_in_half_precision_computes_the_same_when_it_is_shared(found):
    """The adapter is in fp32 either way, and every process has the same micro-batches."""
    for _, _, whole, shared, *_ in found["others"]:
        assert farthest(whole["weights"], shared["weights"]) == 0
        assert whole["losses"] == shared["losses"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_shared(found, family):
    whole, ranks = found["families"][family]
    for rank in ranks:
        # A dual encoder embeds all rows, and takes the loss between them, in another order.
        assert off(whole["gradients"], rank["gradients"]) < (
            1e-5 if FAMILIES[family].architecture == "dual_encoder" else 1e-6
        )
        assert farthest(whole["weights"], rank["weights"]) < 1e-5
        assert (whole["probe"] - rank["probe"]).abs().max() < 1e-4

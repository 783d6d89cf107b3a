"""Rows that were prepared one by one, as one batch."""

import numpy as np
import pytest
import torch

from finetune.assemble.loading import load_base
from finetune.core.batch import join_prompts
from finetune.serving.asking import question_row


def image(width, height):
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def base(tiny_family):
    return load_base(str(tiny_family), device="cpu")


ROWS = [
    (image(90, 70), "What is this?"),
    (None, "And now, tell me more of it?"),
    ([image(50, 130), image(64, 64)], "Hi"),
    (image(333, 70), "What colour is the large square?"),
]


@pytest.mark.parametrize("rows", [(0,), (0, 3), (0, 2, 3), (0, 1), (1, 0, 2, 3), (1, 1)], ids=str)
def test_they_are_what_the_processor_makes_of_the_batch(base, rows):
    collator = base.collator
    examples = [question_row(base.default_task, *ROWS[row], urls=None) for row in rows]
    alone = [collator.prompt_batch([example]) for example in examples]
    pad_id = collator.processor.tokenizer.pad_token_id
    batched, joined = collator.prompt_batch(examples), join_prompts(alone, pad_id=pad_id)
    assert joined.examples == examples and joined.labels is None
    assert joined.inputs.keys() == batched.inputs.keys()
    for name, wanted in batched.inputs.items():
        found = joined.inputs[name]
        if isinstance(wanted, list):
            assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
            continue
        if len(found) != len(wanted):  # Idefics3 has images of zeros for a row without any, which its model leaves out
            assert len(wanted) == len(rows) and name in ("pixel_values", "pixel_attention_mask")
            wanted = wanted[wanted.flatten(1).any(dim=1)]
        assert torch.equal(found, wanted), name


def test_bytes_are_those_of_all_tensors(base):
    batch = base.collator.prompt_batch([question_row(base.default_task, *ROWS[0], urls=None)])
    tensors = [one for value in batch.inputs.values() for one in (value if isinstance(value, list) else [value])]
    assert batch.num_bytes == sum(one.nbytes for one in tensors) > 0

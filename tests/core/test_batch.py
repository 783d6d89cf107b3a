"""Batches of tasks whose labels are not those of tokens."""

import torch

from finetune.core.batch import Batch, Placeholders

IDS = torch.ones(2, 5, dtype=torch.long)
INPUTS = {"input_ids": IDS, "attention_mask": IDS}


def test_labels_that_are_not_of_tokens_stay_as_they_are():
    boxes = torch.tensor([[1.5, 2, 3, 4], [5, 6, 7, 1234.5]])
    batch = Batch(INPUTS, [], boxes)
    assert batch.targets is None
    longer = Placeholders(3, 9).insert(batch)
    assert longer.inputs["input_ids"].shape == (2, 8) and torch.equal(longer.labels, boxes)
    assert torch.equal(Placeholders(3, 9).remove(longer).labels, boxes)
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.labels.dtype == torch.float32 and torch.equal(moved.labels, boxes), "rounded, 1234.5 would be 1232"


def test_labels_of_tokens_get_a_place_for_each_token():
    labels = torch.tensor([[-100, -100, 1, 1, 1], [-100, 1, 1, 1, 1]])
    batch = Placeholders(2, 9).insert(Batch(INPUTS, [], labels))
    assert batch.labels.shape == (2, 7) and batch.targets is not None
    assert torch.equal(Placeholders(2, 9).remove(batch).labels, labels)

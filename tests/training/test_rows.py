"""Batches prepared ahead: by how many processes, and where they lie."""

import os
from multiprocessing import active_children
from types import SimpleNamespace

import pytest
import torch

from finetune.core.batch import Batch
from finetune.core.example import Example
from finetune.errors import RowError
from finetune.recipe import TrainSection
from finetune.training.plan import Plan
from finetune.training.rows import MicroBatchLoader, worker_count

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("wanted", "device", "cores", "processes", "expected"),
    [
        ("auto", CPU, 64, 1, 0),
        ("auto", GPU, 64, 1, 8),
        ("auto", GPU, 64, 16, 4),
        ("auto", GPU, 6, 1, 6),
        ("auto", GPU, 4, 8, 1),
        (0, GPU, 64, 1, 0),
        (3, CPU, 2, 1, 3),
    ],
)
def test_how_many_workers(monkeypatch, wanted, device, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert worker_count(wanted, device) == expected


@pytest.mark.parametrize(("device", "pinned"), [(CPU, False), (GPU, True)])
def test_batches_for_a_gpu_are_pinned(device, pinned):
    loader = MicroBatchLoader([], list, accelerator=SimpleNamespace(process_index=0, device=device), num_workers=0)
    assert loader._loader([], [], list).pin_memory == pinned


def refuse(rows):
    raise RowError("row 3: its image has gone", reason="missing image")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_ours_comes_out_of_a_worker_as_it_is(num_workers):
    rows = [Example(id="3", messages=[], media=(), answers=[])]
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=CPU)
    loader = MicroBatchLoader(rows, refuse, accelerator=accelerator, num_workers=num_workers)
    plan = Plan.of(TrainSection(max_steps=1, batch_size=1), num_rows=1, num_processes=1, seed=0)
    with pytest.raises(RowError) as caught:
        loader.micro_batches(plan, 0)
    assert str(caught.value) == "row 3: its image has gone" and caught.value.reason == "missing image"


def test_a_closed_loader_leaves_no_worker():
    rows = [Example(id=str(number), messages=[], media=(), answers=[]) for number in range(40)]
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=CPU)
    loader = MicroBatchLoader(rows, list, accelerator=accelerator, num_workers=2)
    loader.micro_batches(Plan.of(TrainSection(max_steps=40, batch_size=1), num_rows=40, num_processes=1, seed=0), 0)
    assert len(active_children()) == 2
    loader.close()
    assert active_children() == []


@pytest.mark.gpu
def test_a_batch_for_a_gpu_comes_pinned():
    loader = torch.utils.data.DataLoader(
        range(2), batch_sampler=[[0, 1]], pin_memory=True, collate_fn=lambda rows: Batch({"x": torch.tensor(rows)}, [])
    )
    (batch,) = loader
    assert batch.inputs["x"].is_pinned() and batch.to("cuda", torch.float32).inputs["x"].tolist() == [0, 1]

"""A run on a stream: the same rows and weights with any number of workers, and wherever it was stopped."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from finetune.core.example import Example
from finetune.data import bad_rows
from finetune.data import stream as streams
from finetune.data.open_stream import open_stream
from finetune.data.splits import tally
from finetune.errors import DataError, RowError, StoppedError, TrainingError
from finetune.recipe import TrainSection
from finetune.runs.train import train
from finetune.tasks.vqa import VqaTask
from finetune.training.plan import Plan
from finetune.training.rows import _Arrivals
from tests.data.test_stream import row, write

BAD = 11  # the position of the bad row, beyond the sample


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A sample of 5, a shuffle among 4, pieces of 2."""
    monkeypatch.setattr(streams, "SAMPLE", 5)
    monkeypatch.setattr(streams, "BUFFER", 4)
    monkeypatch.setattr(streams, "_AT_ONCE", 2)


@pytest.fixture
def make(make_recipe, tiny_fast_vlm, tmp_path):
    """Return a function that makes a recipe of 32 rows, four a step, from a stream of 24."""
    folder = tmp_path / "set" / "data"
    write([row(i, answer="red") for i in range(24)], folder / "train-00000-of-00001.parquet")
    write([row(i, answer="red") for i in range(2)], folder / "validation-00000-of-00001.parquet")

    def make(name="whole", *, data=None, **options):
        hub = {"source": "hub", "name": "demo/set", "root": str(folder.parent), "test": None, "streaming": True}
        options = {"max_steps": 8, "eval_steps": 4, "save_steps": 3, "logging_steps": 1, **options}
        return make_recipe(tiny_fast_vlm, name=name, data=hub | (data or {}), train=options, adapter={"publish": None})

    return make


@pytest.fixture
def spoil(make, tmp_path):
    """Make the row at position ``BAD`` a bad one."""
    recipe = make()
    stream = open_stream(recipe.data, task=recipe.task, seed=0, bad=tally(recipe.data, "train", log=print))
    image = stream.reader().at(BAD).row.fields["image"]
    rows = [row(i, answer="red") for i in range(24)]
    (bad,) = [one for one in rows if one["image"]["bytes"] == image.data]
    bad["answer"] = ""
    write(rows, tmp_path / "set" / "data" / "train-00000-of-00001.parquet")


def weights(recipe):
    return load_file(recipe.run_folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def stop_at(monkeypatch, step):
    """Ask the run to stop in the middle of that step."""
    outputs, seen = VqaTask.outputs, []

    def counting(self, model, batch):
        seen.append(batch)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return outputs(self, model, batch)

    monkeypatch.setattr(VqaTask, "outputs", counting)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_bit_for_bit(make, spoil, monkeypatch, capsys, workers):
    """Step 7 begins the second pass."""
    monkeypatch.setattr(bad_rows, "MAX_SHARE", 0.2)  # of so few rows
    skip = {"on_error": "skip"}
    whole, recipe = make(data=skip), make("stopped", data=skip, num_workers=workers)
    train(whole)
    output = capsys.readouterr().out
    assert "rows train a stream, val 2, test 0" in output and output.count("⟦") == 3
    assert "skipped 1 of 32 train rows" in output and "row 11 of pass 1 of the stream" in output
    for step in (4, 7):
        with monkeypatch.context() as patch:
            stop_at(patch, step if step == 4 else 3)
            with pytest.raises(StoppedError, match=f"stopped after step {step} of 8"):
                train(recipe)
    train(recipe)
    assert same(weights(whole), weights(recipe))
    record = json.loads((whole.run_folder / "adapter" / "manifest.json").read_text())["training"]
    assert record["rows"]["train"] == 32 and record["streamed"] == ["train"]
    again = json.loads((recipe.run_folder / "adapter" / "manifest.json").read_text())["training"]
    assert again["rows"] == record["rows"] and again["data"] == record["data"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_on_arrival_stops_the_run(make, spoil, workers):
    with pytest.raises(DataError) as caught:
        train(make(num_workers=workers))
    message = str(caught.value)
    assert message.startswith("demo/set train, row 11 of pass 1 of the stream (question: 'Which?', answer: '')")
    assert "Traceback" not in message and "'answer' must be a non-empty text" in message


def test_a_run_does_not_go_on_from_other_files(make, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(StoppedError):
            train(make())
    write([row(i, answer="blue") for i in range(24)], tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(TrainingError, match="rows.train was '[0-9a-f]{9,}.* and is now"):
        train(make())


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_a_plan_leaves_a_stream_in_its_order(batch_size, accumulation, processes):
    options = TrainSection(max_steps=5, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    plan = Plan.of(options, num_rows=None, num_processes=processes, seed=0)
    assert (plan.total_steps, plan.steps_per_epoch, plan.num_rows) == (5, 5, 40)
    assert [row for step in range(5) for row in plan.rows(step)] == list(range(40))
    for process in range(processes):
        mine = [draw.row for batch in plan.stream(0, process) for draw in batch if draw.supervised]
        assert mine == sorted(mine), "a reader only goes forward"


def test_what_fills_up_a_micro_batch_is_not_supervised():
    """A micro-batch whose rows are all bad, or that only keeps the processes in step."""
    fault, good = RowError("bad"), Example(id="good", messages=[], media=(), answers=[])
    filler = Example(id="filler", messages=[], media=(), answers=[])
    rows = _Arrivals(None, filler, list)
    assert rows.batch([(3, fault), (5, good)]) == ([(good, True)], [(3, fault), (5, None)])
    assert rows.batch([(3, fault), (5, fault)]) == ([(filler, False)], [(3, fault), (5, fault)])
    assert rows.batch([rows[None]]) == ([(filler, False)], [])

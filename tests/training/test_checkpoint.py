"""Checkpoints: whole or not there, refused with the reason, and the one before used."""

import errno
import json
import os

import pytest
import torch

from finetune.adapters.manifest import sha256_hex
from finetune.adapters.strict_json import canonical_json
from finetune.errors import IntegrityError, TrainingError
from finetune.training.checkpoint import Checkpoints

RUN = {"recipe": {"seed": 0, "train": {"learning_rate": 1e-3}}, "num_processes": 1}


@pytest.fixture
def made(tmp_path):
    """Three checkpoints, of which two are kept."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", RUN, keep=2)
    for step in (10, 20, 30):
        checkpoints.write(step, {"adapter/a": torch.full((3,), float(step))}, {"state": {"best_score": 0.1 + 0.2}})
    return checkpoints


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_what_was_written_is_read(made):
    assert names(made) == ["step-00000020", "step-00000030"]
    newest = made.newest(print)
    assert newest.step == 30 and newest.facts["state"]["best_score"] == 0.1 + 0.2
    assert torch.equal(newest.tensors["adapter/a"], torch.full((3,), 30.0))
    assert Checkpoints(made.folder.parent / "none", RUN, keep=2).newest(print) is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def another_step(path):
    path.write_text(path.read_text().replace('"step":30', '"step":31'))


@pytest.mark.parametrize(
    ("file", "harm", "why"),
    [
        ("state.safetensors", cut, "state.safetensors differs from the file that was written"),
        ("state.safetensors", flip, "state.safetensors differs from the file that was written"),
        ("state.safetensors", os.remove, "state.safetensors cannot be read"),
        ("checkpoint.json", cut, "not JSON"),
        ("checkpoint.json", another_step, "checkpoint.json does not match the digest in it"),
        ("checkpoint.json", os.remove, "checkpoint.json cannot be read"),
        ("checkpoint.json", lambda path: path.write_text("[]"), "checkpoint.json must be a JSON object"),
        (
            "checkpoint.json",
            lambda path: path.write_text('{"step": 30}'),
            "checkpoint.json does not match the digest in it",
        ),
    ],
)
def test_a_torn_one_is_refused_and_the_one_before_used(made, file, harm, why):
    harm(made.folder / "step-00000030" / file)
    with pytest.raises(IntegrityError, match=why):
        made.read(made.path(30))
    logged = []
    assert made.newest(logged.append).step == 20
    assert len(logged) == 1 and "step-00000030 is damaged and is not used" in logged[0] and why in logged[0]
    assert names(made) == ["step-00000020", "step-00000030.refused"], "nothing is lost, and it is not in the way"
    made.write(25, {"adapter/a": torch.zeros(1)}, {})
    assert made.newest(print).step == 25


def test_with_nothing_but_torn_ones_the_run_starts_again(made):
    for step in (20, 30):
        flip(made.path(step) / "state.safetensors")
    assert made.newest(print) is None


def test_one_of_another_run_is_refused_with_the_difference(made):
    other = {**RUN, "recipe": {"seed": 0, "train": {"learning_rate": 5e-3}}}
    with pytest.raises(TrainingError) as caught:
        Checkpoints(made.folder, other, keep=2).newest(print)
    assert "recipe.train.learning_rate was 0.001 and is now 0.005" in str(caught.value)
    assert "train.output_dir" in str(caught.value) and "train.resume: never" in str(caught.value)
    assert names(made) == ["step-00000020", "step-00000030"], "they are as they were"
    mixed = Checkpoints(made.folder, other, keep=3)
    mixed.write(5, {"adapter/a": torch.zeros(1)}, {})
    logged = []
    assert mixed.newest(logged.append).step == 5, "an older one of this very run is used"
    assert len(logged) == 2 and "of another run" in logged[0]


def test_one_with_earlier_names_is_of_the_same_run(made):
    def run(**data):
        return {**RUN, "recipe": {**RUN["recipe"], "data": {"source": "jsonl", **data}}}

    old = Checkpoints(made.folder, run(kind="tumor"), keep=2)
    old.write(40, {"adapter/a": torch.zeros(1)}, {})
    assert Checkpoints(made.folder, run(question_type="tumor"), keep=2).read(made.path(40)).step == 40
    assert old.read(made.path(40)).step == 40, "a plug-in's source may have a key of that name"
    with pytest.raises(TrainingError, match="recipe.data.question_type was 'tumor' and is now None"):
        Checkpoints(made.folder, run(question_type=None), keep=2).read(made.path(40))


def rewritten(path, **changes):
    """Changes what a checkpoint says, with the digest that this then has; None takes a key away."""
    facts = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    del facts["digest"]
    path.write_bytes(canonical_json({**facts, "digest": sha256_hex(canonical_json(facts))}))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schema": None}, "schema must be 1 for this version, got None"),
        ({"run": None}, "run must be of type dict, got None"),
        ({"run": []}, r"run must be of type dict, got \[\]"),
        ({"step": "30"}, "step must be of type int, got '30'"),
        ({"files": None}, "files must be of type dict"),
        ({"files": {}}, "files must list state.safetensors"),
        ({"files": {"state.safetensors": {}}}, "state.safetensors differs from the file that was written"),
        ({"files": {"state.safetensors": 1}}, "files must list state.safetensors"),
    ],
)
def test_one_that_lacks_what_is_read_is_torn(made, changes, why):
    rewritten(made.path(30) / "checkpoint.json", **changes)
    with pytest.raises(IntegrityError, match=why):
        made.read(made.path(30))
    assert made.newest(print).step == 20


def test_one_of_a_version_that_recorded_less_is_refused_with_the_way_on(made):
    later = Checkpoints(made.folder, {**RUN, "images": {"train": "ab"}}, keep=2)
    with pytest.raises(
        TrainingError, match="another version of this package wrote it, without a record of the images. Co"
    ):
        later.newest(print)
    assert names(made) == ["step-00000020", "step-00000030"]
    # A version that records no init_from starts every adapter afresh.
    assert Checkpoints(made.folder, {**RUN, "init_from": None}, keep=2).newest(print).step == 30
    with pytest.raises(TrainingError, match="init_from was None and is now 'ns/a@1'"):
        Checkpoints(made.folder, {**RUN, "init_from": "ns/a@1"}, keep=2).newest(print)


def test_a_full_disk_leaves_what_was_there(made, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        made.write(40, {"adapter/a": torch.zeros(1)}, {})
    assert names(made) == ["step-00000020", "step-00000030"], "and nothing half written beside them"
    assert made.newest(print).step == 30


def test_what_a_killed_process_left_is_swept(made):
    (made.folder / ".step-00000040-x").mkdir()
    assert made.newest(print).step == 30
    made.sweep()
    assert names(made) == ["step-00000020", "step-00000030"]


def test_the_file_of_facts_holds_no_pickle_and_no_nan(made):
    facts = json.loads((made.path(30) / "checkpoint.json").read_text())
    assert set(facts) == {"schema", "step", "run", "state", "files", "digest"}
    assert sorted(p.name for p in made.path(30).iterdir()) == ["checkpoint.json", "state.safetensors"]

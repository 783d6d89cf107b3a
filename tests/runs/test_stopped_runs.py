"""Whole runs that are stopped, killed, or started twice."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.errors import StoppedError, TrainingError
from finetune.recipe import parse_recipe
from finetune.runs import fit
from finetune.runs.train import train
from finetune.training import trackers
from finetune.training.loop import Trainer

ROOT = Path(__file__).parents[2]
WEIGHTS = "adapter_model.safetensors"
TRAIN = {"epochs": 2.0, "max_steps": None, "batch_size": 4, "eval_steps": 2, "logging_steps": 1, "save_steps": 3}


@pytest.fixture
def recipe(make_recipe, tiny_fast_vlm, tmp_path):
    def recipe(name="runs", **changes):
        options = {**TRAIN, "output_dir": str(tmp_path / name), **changes.pop("train", {})}
        return make_recipe(tiny_fast_vlm, **{"train": options, "method": {"lora_dropout": 0.2}, **changes})

    return recipe


@pytest.fixture
def stop_at(monkeypatch):
    """Return a function: step -> the next run has a SIGTERM in that step."""

    def stop_at(step):
        update = Trainer._update

        def stopped(self, *args):
            if self.state.step + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
                monkeypatch.setattr(Trainer, "_update", update)
            return update(self, *args)

        monkeypatch.setattr(Trainer, "_update", stopped)

    return stop_at


def bytes_of(result):
    return (result.adapter / WEIGHTS).read_bytes()


def test_the_same_recipe_twice_gives_the_same_bytes_and_a_stop_does_not_change_them(recipe, stop_at, capsys):
    first = train(recipe("a"))
    assert bytes_of(train(recipe("b"))) == bytes_of(first)
    stop_at(5)
    with pytest.raises(StoppedError, match="stopped after step 5 of 10"):
        train(recipe("c"))
    evaluated = (Path(recipe("c").run_folder) / "predictions-base.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    last = train(recipe("c", train={"num_workers": 2, "save_steps": 4}, adapter={"publish": "testing/other"}))
    assert last.ref == "testing/other@1"
    assert bytes_of(last) == bytes_of(first) and last.metrics == first.metrics
    assert "going on from" in capsys.readouterr().out
    assert (last.folder / "predictions-base.jsonl").stat().st_mtime_ns == evaluated, "the base is not evaluated again"
    for name in ("best", "last"):
        assert (last.folder / name / WEIGHTS).read_bytes() == (first.folder / name / WEIGHTS).read_bytes()


def test_an_unfinished_run_with_earlier_names_goes_on(recipe, stop_at, capsys):
    stop_at(5)
    with pytest.raises(StoppedError, match="stopped after step 5 of 10"):
        train(recipe())
    folder = recipe().run_folder
    (checkpoint,) = folder.glob("checkpoints/step-*5/checkpoint.json")
    for path in (
        checkpoint,
        *(folder / name for name in ("recipe.json", "predictions-base.jsonl", "scores-base.json")),
    ):
        text = path.read_text(encoding="utf-8")
        assert text.count("question_type") > 0
        path.write_text(text.replace("by_question_type", "by_kind").replace("question_type", "kind"), encoding="utf-8")
    facts = json.loads(checkpoint.read_text(encoding="utf-8"))
    del facts["digest"]
    checkpoint.write_bytes(canonical_json({**facts, "digest": sha256_hex(canonical_json(facts))}))
    evaluated = (folder / "predictions-base.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    train(recipe())
    assert "going on from" in capsys.readouterr().out
    assert (folder / "predictions-base.jsonl").stat().st_mtime_ns == evaluated, "the base is not evaluated again"


def test_the_folder_of_a_run_records_what_was_run(recipe):
    folder = train(recipe()).folder
    assert {path.name for path in folder.iterdir()} == {
        "adapter", "best", "last", "checkpoints", "log.jsonl", "recipe.json", "environment.json", "result.json",
        "samples.txt", "samples.html", "predictions-base.jsonl", "predictions-adapter.jsonl", "scores-base.json",
        "scores-adapter.json",
    }  # fmt: skip
    resolved = recipe(task={"image_position": "first"})  # as the data has it
    assert parse_recipe(json.loads((folder / "recipe.json").read_text()), source="recipe.json") == resolved
    environment = json.loads((folder / "environment.json").read_text())
    assert {"torch", "transformers", "peft", "accelerate", "bitsandbytes"} == environment["versions"].keys()
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
        assert environment["git"]["commit"] == head.stdout.strip()
    assert (folder / "samples.txt").read_text().count("⟦") == 3
    assert (folder / "samples.html").read_text().count("<img") == 4
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000009", "step-00000010"]


def test_an_unfinished_run_of_another_recipe_is_refused(recipe, stop_at):
    stop_at(4)
    with pytest.raises(StoppedError):
        train(recipe())
    before = sorted((recipe().run_folder / "checkpoints").iterdir())
    with pytest.raises(TrainingError, match="recipe.train.learning_rate was 0.01 and is now 0.02"):
        train(recipe(train={"learning_rate": 0.02}))
    assert sorted((recipe().run_folder / "checkpoints").iterdir()) == before
    assert json.loads((recipe().run_folder / "recipe.json").read_text())["train"]["learning_rate"] == 0.01
    again = train(recipe(train={"learning_rate": 0.02, "resume": "never"}))
    lines = [json.loads(line) for line in (again.folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))


def test_rows_that_changed_are_another_run(recipe, stop_at, rows_folder):
    stop_at(4)
    with pytest.raises(StoppedError):
        train(recipe())
    path = rows_folder / "train.jsonl"
    path.write_text(path.read_text().replace('"answer": "red"', '"answer": "rose"', 1))
    with pytest.raises(TrainingError, match="rows.train was .* and is now"):
        train(recipe())


def test_a_disk_that_is_full_at_the_end_loses_nothing(recipe, monkeypatch):
    """The last checkpoint stands: with room again the run only saves and evaluates."""
    whole = train(recipe("whole"))
    writes = fit.save_weights

    def full(folder, *args, **options):
        if folder.name == "last":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        writes(folder, *args, **options)

    monkeypatch.setattr(fit, "save_weights", full)
    with pytest.raises(TrainingError, match="No space left on device: .*last could not be written.* it goes on from"):
        train(recipe())
    monkeypatch.setattr(fit, "save_weights", writes)
    monkeypatch.setattr(Trainer, "_update", None)  # no step is taken any more
    assert bytes_of(train(recipe())) == bytes_of(whole)


def test_trackers_get_what_the_log_holds(recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(recipe(train={"trackers": ["tensorboard"]})).folder
    events = EventAccumulator(str(folder / "trackers" / "squares"))
    events.Reload()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx({line["step"]: line["loss"] for line in lines if "loss" in line})
    assert {"val.exact_match", "val.loss", "grad_norm", "learning_rate"} <= set(events.Tags()["scalars"])


def test_a_tracker_that_is_not_installed_stops_before_anything(recipe, monkeypatch):
    monkeypatch.setitem(trackers._AVAILABLE, "wandb", lambda: False)
    with pytest.raises(TrainingError, match="train.trackers must name installed packages, got wandb .*pip install wan"):
        train(recipe(train={"trackers": ["tensorboard", "wandb"]}))
    assert not recipe().run_folder.exists()


def start(recipe_file, *args, launcher=(), script=(str(ROOT / "recipes" / "train.py"),)):
    # A Ctrl-C is ignored by what a background shell starts, and that is inherited.
    return subprocess.Popen(
        [sys.executable, *launcher, *script, str(recipe_file), *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip


def steps_logged(folder):
    try:
        return sum('"loss"' in line for line in (folder / "log.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def wait_for_step(process, folder, step):
    """Wait until ``step`` is logged; return False if the process ended before."""
    while steps_logged(folder) < step:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return True


def write(recipe, path):
    path.write_text(json.dumps(recipe.model_dump(mode="json")))  # JSON is YAML
    return path


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_script_saves_and_names_the_way_to_resume(recipe, tmp_path, signum):
    """To the whole group, as a terminal sends it: the workers get it too."""
    long = recipe(train={"epochs": 200.0, "num_workers": 2, "eval_steps": 1000})
    process = start(write(long, tmp_path / "r.yaml"))
    assert wait_for_step(process, long.run_folder, 3), process.stderr.read()
    os.killpg(process.pid, signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert "stopping after this step" in err and "the state is saved in" in err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_waits_until_the_state_is_saved(recipe, tmp_path, signum):
    """accelerate's own process dies of the signal at once."""
    long = recipe(train={"epochs": 200.0, "eval_steps": 1000})
    process = start(write(long, tmp_path / "r.yaml"), launcher=("-m", "finetune.launch"), script=())
    assert wait_for_step(process, long.run_folder, 3), process.stderr.read()
    process.send_signal(signum)
    assert process.wait(timeout=60) == 128 + signum
    kept = {path.name for path in (long.run_folder / "checkpoints").iterdir()}
    assert f"step-{steps_logged(long.run_folder):08d}" in kept
    assert "the state is saved in" in process.communicate()[1]


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2")


@pytest.mark.distributed
def test_two_processes_stop_at_one_step_and_resume_bit_for_bit(recipe, tmp_path):
    options = {"batch_size": 2, "epochs": 6.0}
    for name in ("whole", "stopped"):
        one = recipe(name, train=options)
        file = write(one, tmp_path / f"{name}.yaml")
        if name == "stopped":
            process = start(file, launcher=TORCHRUN)
            assert wait_for_step(process, one.run_folder, 4), process.stderr.read()
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
            assert process.returncode != 0 and "the state is saved in" in err
            step = steps_logged(one.run_folder)
            assert (one.run_folder / "checkpoints" / f"step-{step:08d}").is_dir() and step < 30
        process = start(file, launcher=TORCHRUN)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err[-3000:]
    a, b = (recipe(name).run_folder / "last" / WEIGHTS for name in ("whole", "stopped"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.distributed
def test_all_processes_halve_when_memory_runs_out_on_one(recipe, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text("""
import os, sys, torch
from finetune.recipe import load_recipe
from finetune.runs.train import train
from finetune.tasks.vqa import VqaTask
outputs = VqaTask.outputs
def full(self, model, batch):
    if os.environ["RANK"] == "1" and len(batch.examples) > int(sys.argv[2]):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
    return outputs(self, model, batch)
VqaTask.outputs = full
train(load_recipe(sys.argv[1]))
""")
    weights = []
    for name, size, accumulation, rows in (("small", 1, 4, 9), ("halved", 4, 1, 1)):
        options = {"batch_size": size, "gradient_accumulation_steps": accumulation, "eval_steps": 100}
        one = recipe(name, train=options, method={"lora_dropout": 0.0})
        process = start(write(one, tmp_path / f"{name}.yaml"), str(rows), launcher=TORCHRUN, script=(str(driver),))
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err[-3000:]
        assert out.count("out of memory") == (2 if name == "halved" else 0), "told once for each halving"
        weights.append(load_file(one.run_folder / "last" / WEIGHTS))
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-5


@pytest.mark.slow
def test_twenty_kills_change_nothing(recipe, tmp_path):
    """kill -9 at random steps, in both epochs, while training, validating or saving: the same adapter bit for bit."""
    rng = random.Random(int(os.environ.get("FINETUNE_KILL_SEED", "0")))
    options = {"batch_size": 1, "eval_steps": 5, "save_steps": 2, "early_stopping_patience": 6}  # 36 steps
    whole = {}
    kills, epochs = 0, set()
    for number in range(4):
        seed, workers = number // 2, (0, 2)[number % 2]
        if seed not in whole:
            whole[seed] = train(recipe(f"whole-{seed}", seed=seed, train=options))
        one = recipe(f"killed-{number}", seed=seed, train={**options, "num_workers": workers})
        file = write(one, tmp_path / f"{number}.yaml")
        for _ in range(5):
            target = steps_logged(one.run_folder) + rng.randint(2, 5)
            process = start(file)
            if not wait_for_step(process, one.run_folder, target):
                break
            time.sleep(rng.random() * 0.1)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            epochs.add(1 + (steps_logged(one.run_folder) - 1) // 18)
        process = start(file)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        for name in ("adapter", "best", "last"):
            assert (one.run_folder / name / WEIGHTS).read_bytes() == (
                whole[seed].folder / name / WEIGHTS
            ).read_bytes(), f"run {number}, {name}"
    print(f"{kills} kills, in epochs {sorted(epochs)}")
    assert kills == 20 and epochs == {1, 2}

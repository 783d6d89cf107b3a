"""Sweeps: which runs a grid has, what comes out over the seeds, and going on where one was stopped."""

import json
import signal
from pathlib import Path

import pytest

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.cli import main
from finetune.errors import RecipeError
from finetune.preflight.result import Result
from finetune.recipe import load_recipe
from finetune.registry import AdapterRegistry
from finetune.runs import sweep
from finetune.runs.sweep import format_table, plan, run_sweep, summarize
from tests.scores import scores_json

ROOT = Path(__file__).parents[2]
PHANTOMS = ROOT / "recipes" / "configs" / "medical" / "phantoms.yaml"
RECIPE = """
name: brain
domain: medical
model: {name_or_path: pocket}
method: {name: lora}
data: {source: procedural, name: medical}
train: {epochs: 2, output_dir: OUT}
adapter: {publish: medical/brain}
"""
GRID = ["train.learning_rate=1e-3,3e-3", "seed=1,2,3"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "brain.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "runs")))
    return path


class Door:
    """Stands for the processes of the runs: each leaves what a finished run leaves, with made-up scores.

    Attributes:
        started: the recipes, in order.
        fail: exit code of the run with this place in ``started``.
        stop: place of the run that a signal stops.
        die: place of the run after whose end the sweep dies.
        higher_is_better: whether a larger score is better.
    """

    def __init__(self):
        self.started, self.fail, self.stop, self.die, self.higher_is_better = [], {}, None, None, True

    def __call__(self, command, *, env, passed_on):
        assert command[1:4] == ["-P", "-m", "finetune.launch"]
        place, recipe = len(self.started), load_recipe(command[4], command[5:])
        self.started.append(recipe)
        if place == self.stop:
            passed_on.append(signal.SIGINT)
            return 1
        if place in self.fail:
            return self.fail[place]
        # The larger rate is better on the validation rows and worse on the test rows.
        better = recipe.train.learning_rate > 2e-3
        val, test = (0.7, 0.5) if better else (0.6, 0.8)
        val, test = val + recipe.seed / 100, test + recipe.seed / 100
        recipe.run_folder.mkdir(parents=True, exist_ok=True)
        (recipe.run_folder / "recipe.json").write_text(recipe.model_dump_json())
        Result(
            ref=None,
            steps=5,
            warnings=(),
            metric="exact_match",
            higher_is_better=self.higher_is_better,
            val=val,
            metrics={"base": scores_json(0.1), "test": scores_json(test)},
        ).write(recipe.run_folder)
        if place == self.die:
            raise SystemExit("the machine lost its power")
        return 0


@pytest.fixture
def door(monkeypatch):
    door = Door()
    monkeypatch.setattr(sweep, "run_child", door)
    return door


def test_a_grid_is_every_value_with_every_other(config, tmp_path):
    runs = plan(config, [*GRID, "train.batch_size=8"])
    assert [(r.recipe.train.learning_rate, r.recipe.seed) for r in runs] == [
        (1e-3, 1), (1e-3, 2), (1e-3, 3), (3e-3, 1), (3e-3, 2), (3e-3, 3),
    ]  # fmt: skip
    assert {r.recipe.train.batch_size for r in runs} == {8}
    assert str(runs[0]) == "train.learning_rate=0.001 seed=1"
    assert len({r.recipe.name for r in runs}) == len({r.recipe.run_folder for r in runs}) == 6
    assert {r.recipe.run_folder.parent for r in runs} == {tmp_path / "runs" / "brain-sweep"}
    assert all(r.recipe.name == f"brain-{r.digest[:10]}" for r in runs)


def test_nothing_is_published_unless_asked(config):
    assert {run.recipe.adapter.publish for run in plan(config, GRID)} == {None}
    assert {run.recipe.adapter.publish for run in plan(config, [*GRID, "adapter.publish=medical/x"])} == {"medical/x"}


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("seed=7", [7]),
        ("train.eval_steps=null,5", [None, 5]),
        ("train.learning_rate=1e-3,1e-05, 2", [1e-3, 1e-5, 2]),
        ("method.towers.vision=[fc1,fc2]", [["fc1", "fc2"]]),
        ("method.towers.vision=[fc1],none,{target_modules: [fc2], r: 2}",
         [["fc1"], "none", {"target_modules": ["fc2"], "r": 2}]),
        ("data.rows={train: 16, val: 4, test: 8}", [{"train": 16, "val": 4, "test": 8}]),
        ("task.system_prompt='short, please'", ["short, please"]),
        ("task.system_prompt='a, b',\"c\"", ["a, b", "c"]),
    ],
)  # fmt: skip
def test_values_are_yaml(config, word, values):
    key = word.partition("=")[0]
    runs = plan(config, [word])
    assert [run.settings.get(key, "fixed") for run in runs] == (values if len(values) > 1 else ["fixed"])
    for run, value in zip(runs, values, strict=True):
        raw = run.recipe.model_dump()
        (raw["method"],) = raw["method"]
        for part in key.split("."):
            raw = raw[part]
        kept = {"target_modules": value} if key.startswith("method.towers") and not isinstance(value, dict) else value
        assert raw == kept or kept.items() <= raw.items()


def test_an_earlier_key_is_the_present_one(config):
    rows = "data={source: jsonl, root: here}"
    runs = plan(config, [rows, "data.kind=tumor,place"])
    assert [run.recipe.data.question_type for run in runs] == ["tumor", "place"]
    assert [run.digest for run in runs] == [
        run.digest for run in plan(config, [rows, "data.question_type=tumor,place"])
    ]
    counted = runs[0].recipe.model_dump(mode="json")
    del counted["name"], counted["train"]["output_dir"]
    counted["data"]["kind"] = counted["data"].pop("question_type")
    assert runs[0].digest == sha256_hex(canonical_json(counted)), "a sweep of an earlier release goes on"
    with pytest.raises(
        RecipeError, match="'data.question_type' is given twice, again under its other name by 'data.kind=b'"
    ):
        plan(config, [rows, "data.question_type=a", "data.kind=b"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed"], "each word must be key=value, or key=a,b,c for a grid, got 'seed'"),
        (["=1,2"], "each word must be key=value, .*, got '=1,2'"),
        (
            ["seed=1,2", "seed=3"],
            "a key must be unique, but 'seed' is given twice, again by 'seed=3'. Put all its values in one word",
        ),
        (["seed=1,2,1"], "runs of a grid must differ, but two are the same: seed=1, and seed=1"),
        (["name=a,b"], 'runs of a grid must differ, but two are the same: name="a", and name="b"'),
        (["seed=1,[2"], r"put a value with a comma in quotes or brackets\): the value must be valid YAML"),
        (["seed=1,two"], "seed: .*integer.*Got 'two'"),
        (["train.learningrate=1,2"], "learningrate: unknown key. Did you mean 'learning_rate'?"),
        (["seed=" + ",".join(map(str, range(40))), "train.batch_size=" + ",".join(map(str, range(1, 30)))],
         "a grid must have at most 1000 runs, got 1160"),
    ],
)  # fmt: skip
def test_a_mistake_starts_nothing(config, door, words, message):
    with pytest.raises(RecipeError, match=message):
        run_sweep(config, words)
    assert not door.started


def test_mean_and_spread_over_seeds_sorted_by_validation(config, door, capsys, tmp_path):
    assert run_sweep(config, GRID) == 0
    table = json.loads((tmp_path / "runs" / "brain-sweep" / "sweep.json").read_text())["rows"]
    assert [row["settings"] for row in table] == [{"train.learning_rate": 0.003}, {"train.learning_rate": 0.001}]
    # .71, .72, .73: mean .72, and a standard deviation of a sample of .01
    assert table[0]["val.exact_match"]["mean"] == pytest.approx(0.72) and table[0]["val.exact_match"][
        "spread"
    ] == pytest.approx(0.01)
    assert table[1]["test.exact_match"]["mean"] == pytest.approx(0.82), "better on the test rows, and yet second"
    assert [run["seed"] for run in table[0]["runs"]] == [1, 2, 3] and table[0]["runs"][0]["val.exact_match"] == 0.71
    out = capsys.readouterr().out
    assert "[6/6] train.learning_rate=0.003 seed=3 in " in out
    header, first, second = out[out.index("train.learning_rate  runs") :].splitlines()[:3]
    assert header.split() == ["train.learning_rate", "runs", "val.exact_match", "spread", "test.exact_match", "spread"]
    assert first.split() == ["0.003", "3", "0.720", "0.010", "0.520", "0.010"]
    assert second.split() == ["0.001", "3", "0.620", "0.010", "0.820", "0.010"]
    assert out.endswith("sweep.json\n")


def test_where_less_is_better_the_lowest_comes_first(config, door):
    door.higher_is_better = False
    run_sweep(config, GRID)
    rows = summarize(plan(config, GRID))
    assert [row["settings"]["train.learning_rate"] for row in rows] == [0.001, 0.003]
    assert rows[0]["val.exact_match"]["mean"] == pytest.approx(0.62)


def test_a_sweep_that_dies_after_a_run_trains_nothing_again(config, door):
    door.die = 1
    with pytest.raises(SystemExit):
        run_sweep(config, GRID)
    door.die = None
    assert run_sweep(config, GRID) == 0
    assert len(door.started) == 6


def test_the_result_of_a_run(config, door):
    (run,) = plan(config, ["seed=1"])
    run_sweep(config, ["seed=1"])
    result = run.result()
    assert (result.steps, result.metric, result.val, result.test) == (5, "exact_match", 0.61, 0.81)
    raw = json.loads((run.recipe.run_folder / "result.json").read_text())
    assert raw.keys() == {"ref", "steps", "warnings", "metric", "higher_is_better", "val", "metrics"}


@pytest.mark.parametrize("metric", [{}, {"metric": "exact_match", "higher_is_better": True}])
def test_results_of_release_0_1_0_are_read(config, door, metric):
    (run,) = plan(config, ["seed=1"])
    run_sweep(config, ["seed=1"])
    scores = {"val.exact_match": 0.61} if metric else {"val": 0.61, "test": 0.81}
    old = {"ref": None, "steps": 5, "warnings": [], "digest": run.digest, **metric, **scores}
    now = scores_json(0.81, question_types={"color": 0.5})
    old["metrics"] = {"test": {"by_kind" if key == "by_question_type" else key: part for key, part in now.items()}}
    (run.recipe.run_folder / "result.json").write_text(json.dumps(old))
    assert (run.result().val, run.result().test, run.result().metric) == (0.61, 0.81, "exact_match")
    assert run.result().metrics == {"test": now}


def test_without_validation_rows_the_test_rows_decide(config, door):
    run_sweep(config, GRID)
    runs = plan(config, GRID)
    for run in runs:
        path = run.recipe.run_folder / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"val": None}))
    rows = summarize(runs)
    assert [row["settings"]["train.learning_rate"] for row in rows] == [0.001, 0.003]
    assert format_table(rows).splitlines()[1].split()[1:5] == ["3", "-", "-", "0.820"]


def test_what_has_no_score_yet_comes_last(config, door):
    door.fail = {2: 1}
    words = ["train.learning_rate=1e-3,3e-3,5e-3"]
    run_sweep(config, words)
    rows = summarize(plan(config, words))
    assert [row["settings"]["train.learning_rate"] for row in rows] == [0.003, 0.001, 0.005]
    assert rows[-1]["val.exact_match"] == rows[-1]["test.exact_match"] == {"mean": None, "spread": None}


def test_one_seed_has_no_spread(config, door):
    run_sweep(config, ["train.learning_rate=1e-3,3e-3"])
    (first, _) = summarize(plan(config, ["train.learning_rate=1e-3,3e-3"]))
    assert first["val.exact_match"] == {"mean": 0.7, "spread": None}


def test_a_stopped_sweep_goes_on_where_it_was(config, door, capsys):
    door.stop = 2
    assert run_sweep(config, GRID) == 128 + signal.SIGINT
    assert len(door.started) == 3
    assert "stopped; run the same command again for the unfinished runs" in capsys.readouterr().out
    door.stop = None
    assert run_sweep(config, GRID) == 0
    assert [(r.train.learning_rate, r.seed) for r in door.started[3:]] == [(1e-3, 3), (3e-3, 1), (3e-3, 2), (3e-3, 3)]
    assert capsys.readouterr().out.count("is finished: ") == 2


def test_more_values_run_only_what_is_new(config, door):
    run_sweep(config, ["seed=1,2"])
    run_sweep(config, ["seed=2,3,1"])
    assert [recipe.seed for recipe in door.started] == [1, 2, 3]


def test_another_recipe_is_not_taken_for_finished(config, door):
    run_sweep(config, ["seed=1,2"])
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 3"))
    run_sweep(config, ["seed=1,2"])
    assert len(door.started) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": "0"}'])
def test_a_torn_or_foreign_result_is_not_taken_for_finished(config, door, content):
    (run,) = plan(config, ["seed=1"])
    run.recipe.run_folder.mkdir(parents=True, exist_ok=True)
    (run.recipe.run_folder / "result.json").write_text(content)
    run_sweep(config, ["seed=1"])
    assert len(door.started) == 1 and run.result() is not None


def test_a_run_that_fails_does_not_keep_the_others(config, door, capsys):
    door.fail = {1: 2}
    assert run_sweep(config, GRID) == 1
    assert len(door.started) == 6
    out = capsys.readouterr().out
    assert "failed: train.learning_rate=0.001 seed=2 (exit code 2)" in out
    assert " 2 of 3 " in out
    door.fail = {}
    assert run_sweep(config, GRID) == 0
    assert [r.seed for r in door.started[6:]] == [2]


def test_a_run_that_leaves_nothing_has_failed(config, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_child", lambda command, **options: 0)
    assert run_sweep(config, ["seed=1"]) == 1
    assert "failed: the recipe as it is (exit code 0, but " in capsys.readouterr().out


@pytest.mark.slow
def test_real_runs(tmp_path, capfd):
    few = ["data.rows={train: 16, val: 4, test: 8}", "train.epochs=null", "train.max_steps=2", "train.batch_size=4"]
    words = [*few, "seed=1,2", f"train.output_dir={tmp_path}"]
    assert main(["sweep", str(PHANTOMS), *words]) == 0
    (row,) = json.loads((tmp_path / "phantoms-sweep" / "sweep.json").read_text())["rows"]
    assert all(
        run["finished"] and 0 <= run["val.exact_match"] <= 1 and 0 <= run["test.exact_match"] <= 1
        for run in row["runs"]
    )
    assert AdapterRegistry().list() == []
    capfd.readouterr()
    assert main(["sweep", str(PHANTOMS), *words]) == 0
    assert capfd.readouterr().out.count("is finished: ") == 2

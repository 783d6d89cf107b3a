"""Folders that hold files of others: nothing is started there, and not a byte of them changes."""

import json

import pytest

from finetune import demo
from finetune.cli import main
from finetune.errors import LaunchError, RecipeError, TrainingError
from finetune.runs import sweep
from finetune.runs.train import train
from tests.preflight.test_finished_runs import held

TRAIN = {"max_steps": 1}


@pytest.fixture
def recipe(make_recipe, tiny_fast_vlm):
    return lambda **options: make_recipe(tiny_fast_vlm, train={**TRAIN, **options})


FOREIGN = {
    "weights": {"adapter/adapter_model.safetensors": b"mine", "best/notes": b"mine", "checkpoints/mine": b""},
    "a log": {"log.jsonl": b"{}"},
    "another recipe": {"recipe.json": b'{"name": "pancakes", "flour": 200}'},
    "a list": {"recipe.json": b"[]"},
    "no JSON": {"recipe.json": b"\0" * 20, "result.json": b"{}"},
    "a hidden file": {".git/config": b""},
    "a name for a terminal": {"\x1b[2J": b""},
}


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_run_does_not_begin_among_files_of_others(recipe, kind, resume, monkeypatch):
    recipe = recipe(resume=resume)
    for name, data in FOREIGN[kind].items():
        path = recipe.run_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    before = held(recipe.run_folder)
    monkeypatch.setattr("finetune.runs.run.base_of", lambda *args, **options: 1 / 0)
    for check in ("finetune.runs.train.check_recipe", None):  # by the lock too, without an earlier check
        with pytest.raises(TrainingError) as caught:
            train(recipe)
        names = sorted({name.partition("/")[0] for name in FOREIGN[kind]})
        listed = ", ".join(repr(name) if not name.isprintable() else name for name in names)
        assert f"must be empty or hold a run, but {recipe.run_folder} holds {listed}, and no recipe" in str(
            caught.value
        )
        assert "Move these files away, or give the run another name or train.output_dir" in str(caught.value)
        assert held(recipe.run_folder) == before
        if check:
            monkeypatch.setattr(check, lambda *args, **options: None)


def test_an_error_names_a_few_of_many(recipe):
    folder = recipe().run_folder
    folder.mkdir(parents=True)
    for number in range(8):
        (folder / f"file-{number}").touch()
    with pytest.raises(TrainingError, match="holds file-0, file-1, file-2, file-3, file-4 and 3 more, and no recipe"):
        train(recipe())


def test_an_empty_folder_and_what_a_killed_run_left_are_no_obstacle(recipe):
    folder = recipe().run_folder
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / ".recipe.json.new").write_text("{")
    train(recipe())
    (folder / "result.json").unlink()  # as where a process was killed between moving and starting anew
    for path in folder.iterdir():
        if path.name not in ("recipe.json", "previous"):
            path.rename(folder.parent / path.name)
    assert train(recipe()).adapter.exists()


@pytest.mark.parametrize("name", [".lock", ".recipe.json.new"])
def test_a_link_under_a_name_of_ours_is_of_others(recipe, tmp_path, name):
    theirs, folder = tmp_path / "theirs", recipe().run_folder
    theirs.write_bytes(b"precious")
    folder.mkdir(parents=True)
    (folder / name).symlink_to(theirs)
    with pytest.raises(TrainingError, match=f"must be empty or hold a run, but {folder} holds {name}, and no recipe"):
        train(recipe())
    assert theirs.read_bytes() == b"precious" and (folder / name).is_symlink()


def test_a_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / "theirs").write_bytes(b"precious")
    (tmp_path / ".sweep.json.new").symlink_to(tmp_path / "theirs")
    sweep._write(tmp_path / "sweep.json", {"rows": []})
    assert (tmp_path / "theirs").read_bytes() == b"precious"
    assert json.loads((tmp_path / "sweep.json").read_text()) == {"rows": []} and len(held(tmp_path)) == 2


def test_the_command_refuses_before_torch_is_imported(recipe, tmp_path, capsys):
    folder = recipe().run_folder
    (folder / "adapter").mkdir(parents=True)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe().model_dump(mode="json")))
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    assert f"{folder} holds adapter, and no recipe.json of a run" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"mine", b"[]", b'{"rows": 1}'])
def test_a_sweep_does_not_write_over_a_file_that_is_no_table(recipe, tmp_path, data, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe().model_dump(mode="json")))
    (run,) = sweep.plan(path, [])
    table = run.recipe.run_folder.parent / "sweep.json"
    table.parent.mkdir(parents=True)
    table.write_bytes(data)
    monkeypatch.setattr(sweep, "run_child", lambda *args, **options: 1 / 0)
    with pytest.raises(
        RecipeError, match="sweep.json must hold the table of a sweep, but it holds something else. No run was started"
    ):
        sweep.run_sweep(path, [])
    assert table.read_bytes() == data


def test_a_demo_does_not_write_over_a_page_that_is_not_its_own(tmp_path):
    page = tmp_path / "demo.html"
    page.write_bytes(b"<h1>mine</h1>\xff")
    with pytest.raises(
        LaunchError, match="demo.html must hold the page of a demo, but it holds something else. Nothing was started"
    ):
        demo.run_demo(tmp_path)
    assert held(tmp_path).keys() == {page.relative_to(tmp_path)}

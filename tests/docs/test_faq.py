"""docs/faq.md: the product writes each message that the page quotes."""

import json
import re

import pytest
from PIL import Image

from finetune.cli import main
from finetune.core.example import Example, answer, ask
from finetune.core.extras import LIBRARIES, require_extra
from finetune.core.prediction import Text
from finetune.data.splits import read_split, tally
from finetune.errors import FinetuneError
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.linear_probe import worse_than_probe
from finetune.evaluation.rows import Row
from finetune.evaluation.scores import Scores, Value
from finetune.evaluation.validation import warnings_of, worse_than_base
from finetune.launch.hardware import Hardware
from finetune.launch.launcher import num_processes
from finetune.metrics.exact_match import ExactMatch
from finetune.preflight import check_recipe
from finetune.preflight.finished_runs import refuse_taken
from finetune.recipe import TrainSection, parse_recipe, refuse_incompatible
from finetune.tasks.vqa import VqaConfig
from finetune.training.memory import halved
from finetune.training.plan import Plan
from finetune.training.state import TrainState
from finetune.training.trackers import check_trackers
from tests.docs.test_pages import WHOLE
from tests.docs_code import DOCS

PAGE = (DOCS / "faq.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)
WALKED = {  # caused by tests/docs/test_walk.py, after a run
    "holds a finished run",
    "holds another unfinished run",
    "the adapter was trained on another base",
    "retail/mine cannot be served by vLLM",
    "cannot promote ... Nothing was changed.",
    "A row is never cut. Shorten these rows, make their images smaller",
    "a special token of this base. The base would read it as that token and not as text.",
}


def is_quoted(quoted, message):
    """Return whether a message holds the quoted text, whose dots stand for anything."""
    return all(part in message for part in quoted.split(" ... "))


def recipe(**sections):
    return parse_recipe(WHOLE | {"model": {"name_or_path": "pocket"}} | sections, source="page.yaml")


def read(*rows, **data):
    section = recipe(data={"source": "jsonl", "root": "rows", **data})
    with open("rows/train.jsonl", "w", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    bad = tally(section.data, "train", log=print)
    read_split(section.data, "train", task=section.task, seed=0, bad=bad)
    bad.conclude()


def other_files():
    folder = recipe().run_folder
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    refuse_taken(recipe())


def worse():
    base, adapter = (
        Scores(
            values={"exact_match": Value(value=value, interval=None, n=8, unit=None, higher_is_better=True)},
            baselines={}, by_question_type={}, n=8, truncated=0,
        )
        for value in (1.0, 0.5)
    )  # fmt: skip
    (note,) = worse_than_base(base, adapter)
    raise FinetuneError(note)


def worse_than_the_probe():
    example = Example(id="1", messages=[*ask("What?"), answer("red")], media=(), answers=["red"])
    row = Row(example=example, prediction=Text(text="blue"), values={}, right=False)
    scores = Scores(values={}, baselines={}, by_question_type={}, n=1, truncated=0)
    found = Evaluation(adapter="adapter", config="page", scores=scores, rows=(row,))
    (note,) = worse_than_probe(found, [Text(text="red")], [ExactMatch(VqaConfig())])
    raise FinetuneError(note)


def still_rising():
    state = TrainState(batch_size=1)
    state.step, state.best_step, state.validations = 2, 2, [(1, 0.5, 1.0), (2, 0.6, 0.9)]
    (note,) = warnings_of(state, TrainSection(epochs=1), total_steps=2, base=None)
    raise FinetuneError(note)


GOOD = {"image": "1.png", "question": "What?", "answer": "red"}
PLAN = {"num_rows": 1, "shuffled": False, "total_batch_size": 1, "num_processes": 1, "total_steps": 1, "seed": 0}
GPU = Hardware(kind="cuda", num_devices=1, why="listed by nvidia-smi")
CAUSES = {
    "train.epoch: unknown key": lambda: recipe(train={"epochs": 1, "epoch": 1}),
    "exactly one of": lambda: recipe(train={}),
    "unknown data.source": lambda: recipe(data={"source": "csv"}),
    "environment variables": lambda: recipe(adapter={"license": "${HOME}"}),
    "lora.towers.projector": lambda: refuse_incompatible(
        recipe(method={"name": "lora", "towers": {"projector": "all-linear"}}), source="", model_type="gemma3"
    ),
    "no model at": lambda: (
        read(GOOD),
        check_recipe(recipe(model={"name_or_path": "pockt"}, data={**ALONE, "test": None})),
    ),
    "data.test is": lambda: (read(GOOD), check_recipe(recipe(data=ALONE))),
    "the image ...": lambda: read({**GOOD, "image": "9.png"}),
    "the field 'history'": lambda: read({**GOOD, "history": [["a", "b"]]}),
    "A run may skip": lambda: read(GOOD, {**GOOD, "image": "9.png"}, on_error="skip"),
    "a run's folder": other_files,
    "out of memory": lambda: halved(Plan(batch_size=1, **PLAN), 1),
    "train.trackers": lambda: check_trackers(["trackio"]),
    "NPROC must be": lambda: num_processes(GPU, 2),
    "the adapter is worse": worse,
    "a linear probe": worse_than_the_probe,
    "the validation score": still_rising,
    "needs obstore": lambda: require_extra("object-store", what="s3://bucket"),
}
ALONE = {"source": "jsonl", "root": "rows", "val": None}


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "rows" / "1.png")
    monkeypatch.setitem(LIBRARIES, "object-store", ("obstore_that_is_not_there",))
    monkeypatch.setattr("finetune.training.trackers._AVAILABLE", dict.fromkeys(("wandb", "trackio"), lambda: False))


def test_the_page_has_a_cause_for_each_message():
    caused = {text for text in QUOTED if any(text.startswith(start) for start in CAUSES)}
    assert set(QUOTED) - caused - WALKED == {"no adapter 'retail/nothing'"} and len(caused) == len(CAUSES)


@pytest.mark.parametrize("start", CAUSES)
def test_the_product_writes_the_message(start):
    (quoted,) = [text for text in QUOTED if text.startswith(start)]
    with pytest.raises(FinetuneError) as caught:
        CAUSES[start]()
    message = str(caught.value).replace("obstore_that_is_not_there", "obstore")
    assert is_quoted(quoted, message), message


def test_a_command_prints_one_line_and_ends_with_2(capsys):
    assert main(["ask", "retail/nothing", "rows/1.png", "What?", "--base", "pocket"]) == 2
    error = capsys.readouterr().err
    assert "no adapter 'retail/nothing'" in error and len(error.splitlines()) == 1

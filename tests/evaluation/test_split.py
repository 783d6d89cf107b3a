"""What a run keeps of an evaluation, and takes again when it goes on."""

import json
from types import SimpleNamespace

import pytest

from finetune.core.example import Example, answer, ask
from finetune.core.prediction import Text
from finetune.evaluation.evaluate import Evaluation, score
from finetune.evaluation.measured import Measured
from finetune.evaluation.rows import make_rows
from finetune.evaluation.split import _log, _read, _write
from finetune.metrics.building import metrics_of
from finetune.tasks.vqa import VqaConfig, VqaTask

TASK = VqaTask(VqaConfig(), None)
ROWS = [
    Example(
        id=str(i),
        messages=[*ask(f"q{i}"), answer("a")],
        media=(),
        answers=["a"],
        meta={"question_type": f"type {i % 2}"},
    )
    for i in range(3)
]
PREDICTIONS = [Text(text="a"), Text(text="b\u2028c"), Text(text="a", finish_reason="length")]


@pytest.fixture
def kept(tmp_path):
    measured = Measured(metrics_of(TASK), ROWS, PREDICTIONS)
    scores = score(TASK, measured, blank_predictions=PREDICTIONS)
    found = Evaluation(adapter="base", config="squares", scores=scores, rows=make_rows(TASK, measured))
    _write(tmp_path, found)
    return SimpleNamespace(run_folder=tmp_path, name="squares"), found


def test_what_was_kept_is_read_as_it_was(kept):
    recipe, found = kept
    assert _read(recipe, "base", TASK, ROWS) == found
    assert _read(recipe, "adapter", TASK, ROWS) is None


def test_what_was_kept_under_earlier_names_is_read_as_it_was(kept):
    recipe, found = kept
    for name, old, new in (
        ("predictions-base.jsonl", "kind", "question_type"),
        ("scores-base.json", "by_kind", "by_question_type"),
    ):
        path = recipe.run_folder / name
        text = path.read_text(encoding="utf-8")
        assert f'"{new}":' in text
        path.write_text(text.replace(f'"{new}":', f'"{old}":'), encoding="utf-8")
    assert _read(recipe, "base", TASK, ROWS) == found


def _old(path):
    """As release 0.1 wrote a row."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    old = [
        {"id": r["id"], "kind": r["question_type"], "prediction": "a", "finish_reason": "stop", "answers": ["a"]}
        for r in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("predictions-base.jsonl", _old),
        ("predictions-base.jsonl", lambda path: path.write_text(path.read_text().replace('"id": "2"', '"id": "3"'))),
        ("predictions-base.jsonl", lambda path: path.write_text(path.read_text()[:-9])),
        ("predictions-base.jsonl", lambda path: path.write_text("[]\n" * 3)),
        ("scores-base.json", lambda path: path.write_text('{"exact_match": 0.5, "interval": [0, 1], "n": 3}')),
        ("scores-base.json", lambda path: path.write_text(path.read_text().replace("exact_match", "f1"))),
        ("scores-base.json", lambda path: path.unlink()),
    ],
)
def test_what_is_not_there_whole_or_of_another_release_is_evaluated_again(kept, name, damage):
    recipe, _ = kept
    damage(recipe.run_folder / name)
    assert _read(recipe, "base", TASK, ROWS) is None


def test_its_report(kept):
    lines = []
    _log(kept[1], lines.append)
    assert lines[0].startswith("base on test: exact match 0.667 (") and lines[0].endswith(
        "), majority 1.000, blank image 0.667, 3 rows"
    )
    assert lines[1:] == [
        "  1 of 3 answers were cut at task.max_new_tokens",
        "  exact match 1.000, majority 1.000, blank image 1.000, 2 rows  type 0",
        "  exact match 0.000, majority 1.000, blank image 0.000, 1 rows  type 1",
    ]

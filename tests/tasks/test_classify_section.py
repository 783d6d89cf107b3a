"""Labels and the question come from the train rows; rows without a label of the task are refused before training."""

import json

import pytest

from finetune.assemble.loading import load_base
from finetune.assemble.rows import examples_of
from finetune.errors import DataError, RecipeError
from finetune.evaluation.compare import evaluate
from finetune.runs.run_rows import read_run_rows
from finetune.tasks.classify import ClassifyConfig
from finetune.tasks.label_set import QUESTION


def edit(folder, change, *splits):
    """Change the rows of some splits; a change returns None for a row that stays."""
    for split in splits or ("train", "val", "test"):
        path = folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(change(i, row) or row) + "\n" for i, row in enumerate(rows)))


@pytest.fixture(autouse=True)
def one_word(rows_folder):
    edit(rows_folder, lambda i, row: row | {"answer": "red" if "red" in row["answer"] else "blue"})


@pytest.fixture
def read(make_recipe, tiny_fast_vlm):
    """Return a function that reads the rows of a recipe with some settings of the task."""
    base = load_base(str(tiny_fast_vlm), device="cpu")

    def read(lines=None, **task):
        recipe = make_recipe(tiny_fast_vlm, task={"name": "classify", **task})
        return read_run_rows(recipe, base, (lines if lines is not None else []).append)

    return read


def test_labels_and_question_are_those_of_the_train_rows(read, rows_folder):
    lines = []
    found = read(lines).recipe.task
    assert found.labels == ["blue", "red"] and found.question == "What color is it?"
    assert any("labels=['blue', 'red']" in line and "question='What color is it?'" in line for line in lines)
    written = found.as_trained()
    assert ClassifyConfig.model_validate(written.model_dump()) == written
    edit(rows_folder, lambda i, row: {key: row[key] for key in ("image", "answer")})
    rows = read()
    assert rows.recipe.task.question == QUESTION
    assert QUESTION in str(rows.train[0].prompt) and rows.train[0].question_type == QUESTION
    assert read(question="Which one?").train[0].meta["question"] == "Which one?"


def test_a_rows_answer_is_written_as_its_label(read, rows_folder):
    edit(rows_folder, lambda i, row: row | {"answer": row["answer"].upper()} if i % 2 else None)
    rows = read(labels=["Blue", "red"])
    assert {row.answers[0] for row in (*rows.train, *rows.val, *rows.test)} == {"Blue", "red"}
    assert {row.messages[-1]["content"][0]["text"] for row in rows.train} == {"Blue", "red"}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_row_of_another_label_is_refused_with_its_place(read, rows_folder, split):
    edit(rows_folder, lambda i, row: row | {"answer": "bleu"} if i == 1 else None, split)
    message = rf"{split}.jsonl, line 2: 'answer' must be one of \['blue', 'red'\], got 'bleu'. Did you mean 'blue'\?"
    with pytest.raises(DataError, match=message):
        read(labels=["blue", "red"])
    if split != "train":
        with pytest.raises(DataError, match=message):
            read()


def test_rows_of_a_source_that_reads_no_files_are_refused_too(make_recipe, tiny_fast_vlm):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    data = {"source": "procedural", "name": "retail", "rows": {"train": 8}, "root": None}
    recipe = make_recipe(tiny_fast_vlm, task={"name": "classify", "labels": ["hat", "sock"]})
    from finetune.recipe import ProceduralData

    section = ProceduralData(**{key: value for key, value in data.items() if key != "root"})
    recipe = recipe.model_copy(update={"data": section})
    with pytest.raises(DataError, match=r"row retail:train:\d:0: the answer must be one of \['hat', 'sock'\], got"):
        read_run_rows(recipe, base, print)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, row: row | {"answer": "Red"} if i == 0 else None, "'Red' and 'red' count as equal"),
        (lambda i, row: row | {"answer": "red"}, r"must have at least two labels, got \['red'\]"),
        (lambda i, row: row | {"answer": ["red", "blue"]} if i == 3 else None, r"line 4: 'answer' must be one label"),
        (
            lambda i, row: {"image": row["image"], "captions": ["red", "blue"]},
            "line 1: 'captions' must be absent, because a row of this task has one label",
        ),
    ],
)
def test_train_rows_that_give_no_labels_are_refused(read, rows_folder, change, message):
    edit(rows_folder, change, "train")
    with pytest.raises(DataError, match=message):
        read()


def test_the_last_turn_of_a_conversation_is_its_label(read, rows_folder):
    def talk(i, row):
        user = [{"type": "image"}, {"type": "text", "text": "What color is it?"}]
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": row["answer"]}]
        return {"image": row["image"], "messages": turns}

    edit(rows_folder, talk)
    assert read().recipe.task.labels == ["blue", "red"]
    with pytest.raises(
        DataError, match=r"train.jsonl, line \d: 'messages' must be one of \['blue', 'green'\], got 're"
    ):
        read(labels=["blue", "green"])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"labels": ["red"]}, "task.labels: .*at least 2"),
        (
            {"labels": ["red", "Red"]},
            r"labels 'red' and 'Red' count as equal \(task.answer_normalization: exact\)",
        ),
        ({"labels": ["red", "red"]}, "a label must be unique, but 'red' is given twice"),
        ({"labels": ["red", " blue"]}, "a label must be a text without white space around it, got ' blue'"),
        ({"labels": ["red", "blue"], "positive_label": "bleu"}, "positive_label must be one of the labels.* 'blue'"),
        ({"metrics": ["recall_at_fpr"]}, "positive_label must be set for the metric recall_at_fpr"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(make_recipe, task, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe("pocket", task={"name": "classify", **task})


def test_a_stream_needs_its_labels(make_recipe, tiny_fast_vlm):
    section = ClassifyConfig(name="classify")
    with pytest.raises(DataError, match="task.labels must list the labels if the train rows are a stream"):
        section.from_rows(answers=None, question="What?")
    named = ClassifyConfig(name="classify", labels=["a", "b"]).from_rows(answers=None, question="What?")
    assert named.question == "What?" and named.is_complete and not section.is_complete


def test_the_base_is_evaluated_with_the_labels_of_the_train_rows(make_recipe, tiny_fast_vlm):
    recipe = make_recipe(tiny_fast_vlm, task={"name": "classify"})
    (found,) = evaluate(["base"], [recipe])
    assert list(found.rows[0].prediction.scores) == ["blue", "red"]
    assert list(found.scores.values) == ["accuracy", "balanced_accuracy", "macro_f1", "auroc"]
    majority = found.scores.baselines["majority"]
    assert majority["balanced_accuracy"].value == majority["auroc"].value == 0.5


def test_a_procedural_domain_has_rows_of_some_question_types(make_recipe):
    from finetune.pocket.domains import QUESTION_TYPES_OF, read_domain
    from finetune.recipe import ProceduralData

    task = make_recipe("pocket").task
    for name, types in QUESTION_TYPES_OF.items():
        rows = {"train": 300}
        whole = read_domain(
            ProceduralData(source="procedural", name=name, rows=rows), "train", task=task, seed=0, bad=None
        )
        assert {row.question_type for row in whole} == set(types) and len({row.id for row in whole}) == 300
        one = ProceduralData(source="procedural", name=name, rows={"train": 20}, question_types=[types[0]])
        assert {row.question_type for row in read_domain(one, "train", task=task, seed=0, bad=None)} == {types[0]}
    with pytest.raises(DataError, match="data.question_types must be among garment, .*, got 'garmet'. Did you mean"):
        read_domain(one.model_copy(update={"question_types": ["garmet"]}), "train", task=task, seed=0, bad=None)


def test_rows_are_read_without_a_base(make_recipe):
    recipe = make_recipe("pocket", task={"name": "classify"})
    assert len(examples_of(recipe, "train")) == 18

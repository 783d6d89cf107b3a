"""The caption task: its rows and question, several references, and a run up to the app, the server and an export."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from finetune.cli import main
from finetune.core.example import Example, answer, ask, text_of
from finetune.core.prediction import Text
from finetune.errors import DataError, RecipeError
from finetune.evaluation.compare import evaluate
from finetune.evaluation.evaluate import score
from finetune.evaluation.measured import Measured
from finetune.export.exporting import export_adapter
from finetune.metrics.building import check_best_value, metrics_of
from finetune.metrics.cider_d import cider_d
from finetune.metrics.rouge_l import rouge_l
from finetune.pocket.domains import read_domain
from finetune.recipe import CAPTION_QUESTION, ParquetData, ProceduralData
from finetune.registry import AdapterRegistry
from finetune.runs.train import train
from finetune.serving.loading import load
from finetune.tasks.caption import CaptionConfig, CaptionTask
from finetune.tasks.vqa import VqaConfig
from tests.data.conftest import folder, read, read_rows  # noqa: F401  fixtures
from tests.server.serving import image_part, running

CAPTION = CaptionConfig(name="caption")
TEXTS = ["a red square", "something red"]


def question_of(example):
    return text_of(example.prompt[-1])


def test_captions_answers_and_texts_of_other_columns_are_captions(read):  # noqa: F811
    image = {"image": "good.png"}
    given, answers, text = read(
        {**image, "captions": TEXTS}, {**image, "answer": TEXTS}, {**image, "answer": "a red square"}, task=CAPTION
    )
    assert given.answers == given.captions == answers.answers == answers.captions == TEXTS
    assert text.captions == ["a red square"]
    assert {text_of(answers.in_epoch(epoch, seed=0).messages[-1]) for epoch in range(20)} == set(TEXTS)
    (named,) = read({**image, "caption": "a red square"}, task=CAPTION, answer="caption")
    assert named.captions == ["a red square"]
    with pytest.raises(DataError, match="a row must have the field 'answer', got image, caption. .*data.answer=FIELD"):
        read({**image, "caption": "a red square"}, task=CAPTION)


def test_rows_without_a_question_get_one(read, tmp_path):  # noqa: F811
    row, asking = {"image": "good.png", "captions": TEXTS}, {"question": "What is it?"}
    own = CaptionConfig(name="caption", caption_question="Say it.")
    for task, fields, wanted in (
        (CAPTION, {}, CAPTION_QUESTION),
        (own, {}, "Say it."),
        (own, {"default_question": "And now?"}, "And now?"),
        (own, {"question": None}, "Say it."),
    ):
        plain, asked = read(row, row if "question" in fields else {**row, **asking}, task=task, **fields)
        assert question_of(plain) == plain.meta["question"] == wanted
        assert question_of(asked) == (wanted if "question" in fields else "What is it?")
    Dataset.from_dict({"image": ["good.png"], "captions": [TEXTS]}).to_parquet(tmp_path / "train.parquet")
    (column,) = read_rows(ParquetData(source="parquet", root=str(tmp_path)), task=CAPTION)
    assert question_of(column) == CAPTION_QUESTION
    with pytest.raises(DataError, match="must have the question column 'question', got none"):
        read_rows(ParquetData(source="parquet", root=str(tmp_path)), task=VqaConfig())
    with pytest.raises(DataError, match="a row must have the field 'question'"):
        read(row, task=VqaConfig())


def test_the_manifest_has_the_question_of_the_training():
    assert CAPTION.as_trained().caption_question == CAPTION_QUESTION
    assert CAPTION.as_trained(caption_question="What is it?").caption_question == "What is it?"
    own = CaptionConfig(name="caption", caption_question="Say it.")
    assert own.as_trained(caption_question="What is it?").caption_question == "Say it."


def test_a_conversation_stays_one(read):  # noqa: F811
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a hat"}]
    (row,) = read({"image": None, "messages": turns}, task=CAPTION)
    assert not row.captions and row.answers == ["a hat"]


def rows_of(*references, captions=True):
    return [
        Example(
            id=str(i), messages=[*ask("What is it?", num_images=0), answer(row[0])], media=(), answers=list(row),
            captions=list(row) if captions else [], meta={"question_type": "all"},
        )
        for i, row in enumerate(references)
    ]  # fmt: skip


def test_all_references_count_for_the_model_and_for_the_constant_caption():
    task = CaptionTask(CAPTION, None)
    references = [["a red hat", "one hat"], ["a cap", "a red hat"], ["a blue shoe", "a shoe"]]
    texts = ["one hat", "a red hat", "a blue hat"]
    rows = rows_of(*references)
    scores = score(task, Measured(metrics_of(task), rows, [Text(text=text) for text in texts]))
    assert list(scores.values) == ["cider_d", "bleu_4", "rouge_l"]
    assert scores.first.value == pytest.approx(sum(cider_d(texts, references)) / 3)
    low, high = scores.first.interval
    assert low <= scores.first.value <= high and low < high
    assert scores.values["rouge_l"].value == pytest.approx(
        sum(rouge_l(text, row) for text, row in zip(texts, references, strict=True)) / 3
    )
    constant = ["a red hat"] * 3  # by ROUGE-L it has 1, 1 and .4; a cap .4, 1 and .5; a blue shoe .33, .4 and 1
    found = scores.baselines["majority"]["cider_d"].value
    assert found == pytest.approx(sum(cider_d(constant, references)) / 3) and found > 0
    answers = rows_of(*references, captions=False)
    alone = score(task, Measured(metrics_of(task), answers, [Text(text=text) for text in texts]))
    assert alone.baselines["majority"]["rouge_l"].value < scores.baselines["majority"]["rouge_l"].value


def test_the_constant_caption_is_the_closest_one():
    task = CaptionTask(CAPTION, None)
    rows = rows_of(["a cap"], ["a red hat", "one hat"], ["a blue shoe", "a red hat"])
    assert task.constant(rows).text == "a red hat" and task.constant(rows[2:]).text == "a blue shoe"
    many = rows_of(*[["a blue cap"], ["a red cap"], ["a red hat"]] * 500)
    assert task.constant(many).text == "a red cap"


def test_a_validation_that_ends_early_needs_a_metric_of_rows():
    with pytest.raises(RecipeError, match="the first metric must state a best_value of its rows, but cider_d states"):
        check_best_value(CAPTION)
    check_best_value(CaptionConfig(name="caption", metrics=["rouge_l", "cider_d"]))


@pytest.mark.parametrize("name", ["medical", "retail"])
def test_the_synthetic_worlds_have_captions(name):
    def rows(**more):
        section = ProceduralData(source="procedural", name=name, rows={"test": 60}, captions=True, **more)
        return read_domain(section, "test", task=CAPTION, seed=0, bad=None)

    found = rows()
    assert all(len(row.captions) == 2 and row.answers == row.captions for row in found)
    assert {question_of(row) for row in found} == {CAPTION_QUESTION} and {row.question_type for row in found} == {"all"}
    assert len({row.captions[0] for row in found}) > 10
    assert [row.answers for row in rows()] == [row.answers for row in found]
    asked = ProceduralData(source="procedural", name=name, rows={"test": 60})
    for row, other in zip(found, read_domain(asked, "test", task=VqaConfig(), seed=0, bad=None), strict=True):
        assert (row.images[0] == other.images[0]).all(), "the images are those of the questions"
        if other.question_type in ("garment", "color", "pattern", "size", "margin", "side"):
            assert all(other.answers[0] in caption for caption in row.captions), (other.answers, row.captions)
        if other.question_type in ("tag", "lesion"):
            has = "with a price tag" in row.captions[0] or "lesion on" in row.captions[0]
            assert has == (other.answers[0] == "yes")


@pytest.fixture
def described(rows_folder):
    """Rows with two captions and without a question."""
    for split in ("train", "val", "test"):
        file = rows_folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            color = "red" if "red" in row.pop("answer") else "blue"
            row["captions"] = [f"a {color} square of noise", f"noise in {color}"]
            del row["question"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows_folder


def test_a_run_learns_captions_publishes_and_describes(make_recipe, described, tiny_fast_vlm, tmp_path, capsys):
    recipe = make_recipe(
        tiny_fast_vlm,
        task={"name": "caption"},
        method={"name": "lora", "r": 8, "lora_alpha": 16, "towers": {"language": "all-linear"}},
        train={"max_steps": 40, "eval_steps": 10, "learning_rate": 0.02},
        adapter={"publish": "testing/captions"},
    )
    run = train(recipe)
    test, base = run.metrics["test"], run.metrics["base"]
    assert list(test.values) == list(base.values) == ["cider_d", "bleu_4", "rouge_l"]
    assert test.first.value > base.first.value and test.values["rouge_l"].value > 0.5
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val.cider_d"] for line in log if "val.cider_d" in line}
    task = load(run.ref, base=str(tiny_fast_vlm), device="cpu").adapter.manifest.task
    steps = json.loads((run.adapter / "manifest.json").read_text())["training"]["steps"]
    assert len(scores) == 4 and scores[steps] == max(scores.values()), "the first metric chooses the weights"
    assert task.name == "caption" and task.caption_question == CAPTION_QUESTION
    assert AdapterRegistry().list(metric=f"test.cider_d>={test.first.value - 1e-6}")
    assert not AdapterRegistry().list(metric=f"test.cider_d>{test.first.value + 1e-6}")

    vlm = load(run.ref, base=str(tiny_fast_vlm), device="cpu")
    row = json.loads((run.folder / "predictions-adapter.jsonl").read_text().splitlines()[0])
    image = Path(row["images"][0])
    text = vlm.caption(image)
    assert text == vlm.ask(image, CAPTION_QUESTION) == row["prediction"]["text"] and len(row["references"]) == 2
    assert row["right"] is None and row["values"]["cider_d"] is None and row["values"]["rouge_l"] is not None
    with running(vlm, [run.ref]) as server:
        parts = [image_part(image.read_bytes()), {"type": "text", "text": CAPTION_QUESTION}]
        found = server.post({"model": run.ref, "messages": [{"role": "user", "content": parts}]}).json()
    assert found["choices"][0]["message"]["content"] == text
    (again,) = evaluate([run.ref], [recipe])
    assert again.scores.values == test.values

    out = tmp_path / "table.json"
    words = ["evaluate", "base", run.ref, "--data", str(described / "test.jsonl"), "--base", str(tiny_fast_vlm)]
    assert main([*words, "--json", str(out)]) == 0
    assert re.search(r"cider d +95 % interval", capsys.readouterr().out)
    table = json.loads(out.read_text())["rows"]
    assert table[1]["scores"]["values"]["cider_d"]["value"] == pytest.approx(test.first.value)
    done = export_adapter(run.ref, to="peft", output=tmp_path / "peft", base=str(tiny_fast_vlm))
    card = (done.folder / "README.md").read_text()
    assert f"question = {CAPTION_QUESTION!r}" in card and f"for captions with the question `{CAPTION_QUESTION}`" in card

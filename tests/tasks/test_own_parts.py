"""A task with rows, batches and a head of its own: the one of docs/extend.md, from a recipe to an app."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch

from finetune import plugins
from finetune.adapters.folder import read_folder
from finetune.adapters.manifest import CONFIG_NAME
from finetune.adapters.requirements import require_usable
from finetune.assemble.loading import load_base
from finetune.errors import DataError, ExportError, ManifestError, ModelError, PluginError, ProbeError, RecipeError
from finetune.evaluation.compare import evaluate
from finetune.export.exporting import export_adapter
from finetune.recipe import FullModulesSection, HeadSection
from finetune.registry import AdapterRegistry
from finetune.runs.saving import data_digest
from finetune.runs.train import train
from finetune.serving.loading import load
from tests.docs_code import block
from tests.server.serving import body, running
from tests.serving.test_app import image, resave, same, state

CLASSES = ["blue", "red"]


@pytest.fixture(scope="module", autouse=True)
def graded(tmp_path_factory):
    """The modules of the page, registered as a script would."""
    folder = tmp_path_factory.mktemp("grade")
    for name in ("finetune_grade", "finetune_grade_batches"):
        (folder / f"{name}.py").write_text(block("extend.md", f"{name}.py"), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        found = importlib.import_module("finetune_grade")
        plugins.register("tasks", "grade", found.GradeTask)
        plugins.register("objectives", "class_cross_entropy", found.ClassCrossEntropy)
        yield found
        plugins.unregister("tasks", "grade")
        plugins.unregister("objectives", "class_cross_entropy")
        for name in ("finetune_grade", "finetune_grade_batches"):
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def one_word(rows_folder):
    """Have every row answer with a class."""
    for path in rows_folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["answer"] = next(name for name in CLASSES if name in str(row["answer"]))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make_grade(make_recipe):
    """Return a function that makes the recipe of a grade on a base."""

    def make(base, *, classes=CLASSES, **changes):
        task = {"name": "grade", "classes": classes}
        return make_recipe(base, **{"task": task, "name": "grade", "adapter": {"publish": "testing/grade"}, **changes})

    return make


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_the_head_learns_is_saved_and_answers_as_it_was_evaluated(make_grade, family, tmp_path):
    from tests.tiny import FAMILIES

    base = FAMILIES[family](tmp_path / family)
    run = train(make_grade(base, train={"max_steps": 24, "learning_rate": 0.01}))
    assert run.metrics.keys() == {"test"}, "the base alone has no head"
    losses = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert sum(losses[-6:]) < sum(losses[:6]) and losses[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=0.35)
    manifest = read_folder(run.adapter).manifest
    lora, head = manifest.adapter.parts
    assert (lora.method, head.method, head.options) == ("lora", "head", {"num_outputs": 2})
    assert [manifest.adapter.tensors[name].shape[0] for name in head.names] == [2] * len(head.names)
    before = state(load_base(str(base), device="cpu").model)
    vlm = load("testing/grade", base=str(base), device="cpu")
    assert vlm.adapter.probe.verdict == "passed" and same(state(vlm.model), before)
    rows = [json.loads(line) for line in (run.folder / "predictions-adapter.jsonl").read_text().splitlines()]
    assert all(row["prediction"]["type"] == "label" for row in rows)
    (again,) = evaluate([run.ref], [make_grade(base)])
    assert [row.prediction.label for row in again.rows] == [row["prediction"]["label"] for row in rows]
    for row, found in zip(rows, again.rows, strict=True):
        assert found.prediction.scores == pytest.approx(row["prediction"]["scores"], abs=1e-5)


def test_a_tuned_prompt_and_the_head_train_in_one_run(make_grade, tiny_fast_vlm):
    method = [{"name": "prompt_tuning", "num_virtual_tokens": 3}]
    run = train(make_grade(tiny_fast_vlm, method=method))
    vlm = load(run.adapter, base=str(tiny_fast_vlm), device="cpu")
    first = vlm.predict(image(), "What color is it?")
    assert set(first.scores) == set(CLASSES) and sum(first.scores.values()) == pytest.approx(1)
    with vlm.using(None):
        assert isinstance(vlm.ask(image(), "What color is it?"), str), "the base is the base again"
    assert vlm.predict(image(), "What color is it?") == first


def test_an_app_and_a_server_name_its_use(make_grade, make_recipe, tiny_fast_vlm):
    grade = train(make_grade(tiny_fast_vlm))
    other = train(make_recipe(tiny_fast_vlm))
    vlm = load(grade.ref, base=str(tiny_fast_vlm), device="cpu")
    model_type = vlm.base.family.model_type
    refusal = rf"ask\(image, question\) does not support task grade on a {model_type} base. Use predict"
    with pytest.raises(ModelError, match=refusal):
        vlm.ask(image(), "What color is it?")
    vlm.add(other.ref)
    with vlm.using(None), pytest.raises(ModelError, match=r"ask_batch\(.*\) does not support task grade"):
        vlm.ask_batch([image()], ["What color is it?"], adapters=[grade.ref])
    (answer,) = vlm.ask_batch([image()], ["What color is it?"], adapters=[other.ref])
    with vlm.using(other.ref):
        assert answer == vlm.ask(image(), "What color is it?") == vlm.predict(image(), "What color is it?").text
    with running(vlm, [grade.ref, other.ref]) as server:
        found = server.post(body(model=grade.ref))
        assert found.status_code == 400, found.text
        assert "of task grade. Use it in Python by predict" in found.json()["error"]["message"]
        assert server.post(body(model=other.ref)).status_code == 200
    with pytest.raises(
        RecipeError, match=r"the base alone cannot be evaluated with task grade: the task predicts with parts of"
    ):
        evaluate(["base"], [make_grade(tiny_fast_vlm)])
    with pytest.raises(RecipeError, match=r"testing/squares\S* cannot be evaluated with task grade"):
        evaluate([other.ref], [make_grade(tiny_fast_vlm)])
    with pytest.raises(RecipeError, match=r"testing/grade\S* cannot be evaluated with task vqa"):
        evaluate([grade.ref], [make_recipe(tiny_fast_vlm)])
    with pytest.raises(RecipeError, match=r"cannot be evaluated with task.classes \['red', 'blue'\]: its part was"):
        evaluate([grade.ref], [make_grade(tiny_fast_vlm, classes=CLASSES[::-1])])


def test_a_head_alone_trains_and_one_of_zeros_is_not_what_was_saved(make_grade, tiny_fast_vlm, tmp_path):
    run = train(make_grade(tiny_fast_vlm, method=[]))
    folder = read_folder(run.adapter)
    assert folder.manifest.adapter.methods == "head"
    assert load(run.adapter, base=str(tiny_fast_vlm), device="cpu").adapter.probe.verdict == "passed"
    tensors = {name: tensor * 0.5 for name, tensor in folder.tensors.items()}
    config = json.loads((run.adapter / CONFIG_NAME).read_text())
    resave(run.adapter, tensors, config, folder.manifest)
    with pytest.raises(ProbeError, match="must have the effect that it had when it was saved"):
        load(run.adapter, base=str(tiny_fast_vlm), device="cpu")


def test_prompts_that_an_app_cannot_repeat_are_refused(make_grade, rows_folder, tiny_fast_vlm):
    path = rows_folder / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        turns = [
            ("user", "Hello"),
            ("assistant", "Hello"),
            ("user", row.pop("question")),
            ("assistant", row.pop("answer")),
        ]
        row["messages"] = [{"role": role, "content": text} for role, text in turns]
        row["messages"][0]["content"] = [{"type": "image"}, {"type": "text", "text": "Hello"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=r"predict\(image, question\) must repeat the prompt that row .*, but it does not"
    ):
        train(make_grade(tiny_fast_vlm))


def test_parts_are_trained_once(graded, make_recipe, make_grade, tiny_fast_vlm, monkeypatch):
    with pytest.raises(RecipeError, match="method must name at least one method, got none"):
        make_recipe(tiny_fast_vlm, method=[])
    part = HeadSection(num_outputs=2)
    monkeypatch.setattr(graded.GradeConfig, "parts", property(lambda self: [part, part]))
    with pytest.raises(RecipeError, match="a part of task grade must be unique, but 'head' is given twice"):
        make_grade(tiny_fast_vlm)
    monkeypatch.setattr(
        graded.GradeConfig, "parts", property(lambda self: [FullModulesSection.model_construct(name="lora")])
    )
    with pytest.raises(RecipeError, match="method must not name lora, because task grade adds it"):
        make_grade(tiny_fast_vlm)


def test_an_objective_that_needs_the_base_alone_is_refused(make_grade, graded, tiny_fast_vlm, monkeypatch):
    monkeypatch.setattr(graded.ClassCrossEntropy, "needs_reference", True)
    with pytest.raises(RecipeError, match="objective class_cross_entropy needs the outputs of the base alone"):
        train(make_grade(tiny_fast_vlm))


def test_an_objective_that_couples_rows_must_have_the_method(make_grade, graded, tiny_fast_vlm, monkeypatch):
    monkeypatch.setattr(graded.ClassCrossEntropyConfig, "couples_rows", True)
    with pytest.raises(
        PluginError, match="must have a method accumulate_gradients if and only if its Config sets couples_rows"
    ):
        train(make_grade(tiny_fast_vlm))


def test_a_row_of_no_class_and_a_recipe_that_names_the_head_are_refused(make_grade, make_recipe, tiny_fast_vlm):
    with pytest.raises(DataError, match=r"train.jsonl, line \d+: 'answer' must be one of green, got '(red|blue)'"):
        train(make_grade(tiny_fast_vlm, classes=["green"]))
    with pytest.raises(RecipeError, match="method: name must be one of full_modules, lora, prompt_tuning, got 'head'"):
        make_recipe(tiny_fast_vlm, method={"name": "head", "num_outputs": 2})


def test_what_cannot_hold_a_head_refuses_it(make_grade, tiny_fast_vlm, tmp_path):
    run = train(make_grade(tiny_fast_vlm))
    for target, message in (
        ("merged", "cannot be merged: the head of its task replaces the language head"),
        ("peft", "PEFT's format holds one method. Load it with finetune.load"),
        ("vllm", r"it serves only LoRA, got lora\+head"),
    ):
        with pytest.raises(ExportError, match=message):
            export_adapter(
                run.ref, to=target, output=tmp_path / "out", registry=AdapterRegistry(), base=str(tiny_fast_vlm)
            )


def test_a_manifest_whose_parts_are_not_those_of_its_task_is_refused(make_grade, make_recipe, tiny_fast_vlm):
    grade = read_folder(train(make_grade(tiny_fast_vlm)).adapter).manifest
    plain = read_folder(train(make_recipe(tiny_fast_vlm)).adapter).manifest
    require_usable(grade)
    require_usable(plain)
    for manifest, message in (
        (
            grade.model_copy(update={"task": plain.task}),
            "task vqa must not have the part head, but this one has one",
        ),
        (plain.model_copy(update={"task": grade.task}), "task grade must have the part head, but this one has none"),
        (
            grade.model_copy(update={"task": grade.task.model_copy(update={"classes": ["a"]})}),
            "the part head must have the options {'num_outputs': 1} of the task grade, got {'num_outputs': 2}",
        ),
    ):
        with pytest.raises(ManifestError, match=message.replace("{", r"\{").replace("}", r"\}")):
            require_usable(manifest)


def test_a_task_reads_columns_of_its_own(graded, make_recipe, rows_folder, tiny_fast_vlm):
    class Boxes(graded.GradeConfig):
        columns = ("rings",)

        def to_example(self, row):
            example = super().to_example(row)
            return replace(example, meta=example.meta | {"rings": row.own("rings")})

    from finetune.data.splits import read_split, tally

    path = rows_folder / "train.jsonl"
    lines = [json.loads(line) | {"rings": number} for number, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = make_recipe(tiny_fast_vlm).data
    logged, digests = [], set()
    for task, unread in ((Boxes(name="grade", classes=CLASSES), False), (make_recipe(tiny_fast_vlm).task, True)):
        bad = tally(section, "train", log=logged.append)
        rows = read_split(section, "train", task=task, seed=0, bad=bad)
        assert ("rings" in bad.unread) is unread
        digests.add(data_digest(rows))
        assert ("columns" in rows[0].meta) is not unread
        assert [row.meta.get("rings") for row in rows] == ([None] * len(rows) if unread else list(range(len(rows))))
    path.write_text("".join(json.dumps(line | {"rings": 0}) + "\n" for line in lines))
    bad = tally(section, "train", log=logged.append)
    digests.add(data_digest(read_split(section, "train", task=Boxes(name="grade", classes=CLASSES), seed=0, bad=bad)))
    assert len(digests) == 3, "the values of a task's own columns are of the rows"

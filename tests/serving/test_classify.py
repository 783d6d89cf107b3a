"""Classification from images to an app: trained, published, loaded in another process, gated, served and shown."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from finetune.adapters.folder import read_folder
from finetune.cli import main
from finetune.errors import DataError, ModelError
from finetune.evaluation.compare import evaluate
from finetune.metrics.names import named_values
from finetune.playground.answers import answer_side_by_side
from finetune.playground.catalog import read_catalog
from finetune.registry import AdapterRegistry
from finetune.runs.train import train
from finetune.serving.loading import load
from tests.server.serving import QUESTION, body, running
from tests.tiny import FAMILIES

LABELS = ["a blue square", "a red square"]


def square(red, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 60, (40, 32, 3), dtype=np.uint8)
    pixels[..., 0 if red else 2] += 180
    return pixels


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base that learns colours in some steps."""
    return FAMILIES["smolvlm"](tmp_path_factory.mktemp("base") / "smolvlm")


@pytest.fixture
def recipe(make_recipe, rows_folder, base):
    for path in rows_folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{"image": row["image"], "answer": LABELS["red" in row["answer"]]} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_recipe(
        base,
        task={"name": "classify"},
        train={"max_steps": 100, "eval_steps": 50, "learning_rate": 0.01},
        data={"question": None, "default_question": QUESTION},
    )


def test_train_publish_load_and_classify(recipe, base, tmp_path, capsys):
    run = train(recipe)
    shown = capsys.readouterr().out
    assert "labels=['a blue square', 'a red square'], question='What color is it?'" in shown
    named = named_values({who: scores.to_json() for who, scores in run.metrics.items()})
    assert named["test.accuracy"] == named["test.balanced_accuracy"] == named["test.auroc"] == 1.0
    assert named["test.blank_image.auroc"] == 0.5, "a grey image has the same scores in each row"
    task = read_folder(run.adapter).manifest.task
    assert (task.labels, task.question) == (LABELS, QUESTION)
    kept = [json.loads(line) for line in (run.folder / "predictions-adapter.jsonl").read_text().splitlines()]

    (again,) = evaluate([run.ref], [recipe])
    for row, found in zip(kept, again.rows, strict=True):
        assert found.prediction.scores == pytest.approx(row["prediction"]["scores"], abs=1e-5), "features were stored"
    assert main(["registry", "promote", run.ref, "prod", "--require", "test.balanced_accuracy>=.8"]) == 0
    assert main(["registry", "promote", run.ref, "prod", "--require", "test.auroc>1"]) == 1

    vlm = load("testing/squares@prod", base=str(base), device="cpu")
    for red in (False, True):
        found = vlm.predict(square(red), QUESTION)
        assert found.label == LABELS[red] and sum(found.scores.values()) == pytest.approx(1)
        assert list(found.scores) == LABELS and found == vlm.predict(square(red)), "its own question is the default"
        assert vlm.classify(square(red)) == vlm.ask(square(red), QUESTION) == LABELS[red]
        assert vlm.classify(square(red), LABELS[:1]) == LABELS[0]
        assert "".join(vlm.stream(square(red), QUESTION)) == LABELS[red]
    with pytest.raises(DataError, match=r"among the labels of the adapter's training, .*, got 'a red squar'. Did you"):
        vlm.classify(square(True), ["a red squar"])
    with pytest.raises(ModelError, match=r"caption\(image\) does not support task classify. Use classify\(image\)"):
        vlm.caption(square(True))
    with vlm.using(None), pytest.raises(ModelError, match=r"classify\(image, labels\) does not support task vqa"):
        vlm.classify(square(True))

    Image.fromarray(square(True)).save(tmp_path / "red.png")
    code = f"""
import finetune
vlm = finetune.load("testing/squares@prod", base={str(base)!r}, device="cpu")
print(vlm.classify({str(tmp_path / "red.png")!r}), vlm.predict({str(tmp_path / "red.png")!r}).scores)
"""
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.startswith(f"a red square {{'{LABELS[0]}': ")


def test_the_server_and_the_page_answer_with_the_label(recipe, make_recipe, base):
    run = train(recipe)
    free = make_recipe(
        base,
        data=recipe.data.model_dump(),
        name="free",
        adapter={"publish": "a/free"},
        train={"max_steps": 6},
    )
    free = train(free)
    vlm = load("base", base=str(base), device="cpu")
    image = square(True)
    entries = read_catalog(AdapterRegistry(), [run.ref], vlm.base.identity)
    _, shown = answer_side_by_side(vlm, image, QUESTION, entries)
    assert (shown.text, shown.error) == (LABELS[1], None)
    with vlm.using(free.ref):
        text = vlm.ask(image, QUESTION)
    # A batch of labels is not answered with the generated texts of other adapters, nor the other way round.
    mixed = vlm.ask_batch([image] * 3, [QUESTION] * 3, adapters=[free.ref, run.ref, None])
    assert mixed[:2] == [text, LABELS[1]]
    with running(vlm, [run.ref]) as server:
        import base64

        from tests.server.serving import png

        url = f"data:image/png;base64,{base64.b64encode(png('red')).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        answer = server.post(body(model=run.ref, question=content)).json()
        assert answer["choices"][0]["message"]["content"] in LABELS and answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] > 1
        answered = server.post(body(model=run.ref, question=content, stream=True)).text
        assert answer["choices"][0]["message"]["content"] in answered and answered.endswith("data: [DONE]\n\n")


def test_a_tuned_prompt_classifies_as_it_was_evaluated(recipe, base):
    from finetune.recipe import PromptTuningSection

    method = [PromptTuningSection(name="prompt_tuning", num_virtual_tokens=3)]
    run = train(recipe.model_copy(update={"method": method}))
    vlm = load(run.adapter, base=str(base), device="cpu")
    (again,) = evaluate([str(run.adapter)], [recipe])
    for row in again.rows:
        found = vlm.predict(row.example.images[0])
        assert found.scores == pytest.approx(row.prediction.scores, abs=1e-5)

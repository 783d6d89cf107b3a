"""Labels are scored as the plain forward scores each of them alone, and each prompt goes through the model once."""

import math

import pytest
import torch

from finetune.assemble.batches import Batches
from finetune.assemble.loading import load_base
from finetune.core.example import Example
from finetune.core.prediction import Label
from finetune.errors import DataError
from finetune.evaluation.predict import Predictor
from finetune.methods.adapter import attach
from finetune.tasks import likelihood
from finetune.tasks.classify import ClassifyConfig, ClassifyTask
from tests.matrix import LORA, PROMPT, recipe_of
from tests.tasks.test_continuous_batching import FIXED, forwards, rows  # noqa: F401  a fixture

LABELS = ["red", "red and blue", "red and green", "blue", "It is a very dark color"]


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """Let each test compare the first texts anew."""
    monkeypatch.setattr(likelihood, "_TRIED", likelihood.WeakKeyDictionary())


def section(**options):
    return ClassifyConfig(**{"name": "classify", "labels": LABELS, "max_new_tokens": 12, **options})


def predictor_of(base, options, *, placeholders=None, batch_size=5, **more):
    batches = Batches(base.collator_of(options), placeholders)
    return Predictor(
        model=base.model,
        task=base.task(options),
        prompt_batch=batches.prompt_batch,
        prompt_parts=batches.prompt_parts,
        batch_size=batch_size,
        **more,
    )


def one_alone(base, example, label, placeholders=None):
    """The log-likelihood of one label and its number of tokens, by the forward of a training batch with one row."""
    batch = base.collator.training_batch([(example.with_text(label), True)])
    batch = placeholders.insert(batch) if placeholders else batch
    with torch.inference_mode():
        logits = base.family.outputs(base.model, batch.inputs)
    found = logits.flatten(0, 1)[batch.targets.predictors].log_softmax(dim=-1)
    return found.gather(1, batch.targets.tokens[:, None]).sum().item(), len(batch.targets.tokens)


def scores_alone(base, example, placeholders=None, *, normalized=False, labels=LABELS):
    found = [one_alone(base, example, label, placeholders) for label in labels]
    sums = torch.tensor([total / count if normalized else total for total, count in found], dtype=torch.float64)
    return dict(zip(labels, sums.softmax(dim=0).tolist(), strict=True))


def same(predictions, base, examples, placeholders=None, **options):
    for prediction, example in zip(predictions, examples, strict=True):
        wanted = scores_alone(base, example, placeholders, **options)
        assert prediction.scores == pytest.approx(wanted, abs=1e-5)
        logs = {label: math.log(score) for label, score in wanted.items()}
        assert {label: math.log(score) for label, score in prediction.scores.items()} == pytest.approx(logs, abs=1e-4)
        assert prediction.label == max(wanted, key=wanted.get)
    return True


def test_each_family_scores_labels_as_the_plain_forward_does(tiny_family, forwards):  # noqa: F811
    base, lines = load_base(str(tiny_family), device="cpu"), []
    predictor = predictor_of(base, section(), log=lines.append)
    examples = rows()
    assert same(predictor(examples, title="x"), base, examples)
    if (why := FIXED.get(base.identity.model_type)) is None:
        # Tried first: three rows against `generate`, and one row against the plain forward. Then each image goes
        # through the model once; two of the four rows of images that are equal are equal rows.
        assert lines == [] and forwards["rest"] >= 1 + 9
    else:
        assert len(lines) == 1 and why in lines[0] and not forwards


@pytest.mark.parametrize("normalized", [False, True])
def test_the_length_of_a_label_counts_or_not(tiny_fast_vlm, normalized):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    predictor = predictor_of(base, section(length_normalized=normalized))
    assert same(predictor(rows(), title="x"), base, rows(), normalized=normalized)
    shares = predictor(rows()[:1], title="x")[0].scores
    assert (shares["It is a very dark color"] > 0.05) is normalized


@pytest.mark.parametrize("method", [LORA, PROMPT, [PROMPT, LORA]], ids=["lora", "prompt", "both"])
@pytest.mark.parametrize("family", ["fast_vlm", "qwen2_5_vl", "gemma3"])
def test_an_adapter_scores_as_its_own_plain_forward(family, method, tmp_path):
    from tests.tiny import FAMILIES

    folder = FAMILIES[family](tmp_path / family)
    base = load_base(str(folder), device="cpu")
    plain = predictor_of(base, section())(rows()[:1], title="x")[0].scores
    attachment = attach(base.host, recipe_of(method, folder, tmp_path).method)
    with torch.no_grad():
        for parameter in attachment.parameters.values():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    attachment.freeze()
    base.model.eval()
    found = predictor_of(base, section(), placeholders=attachment.placeholders)(rows(), title="x")
    assert same(found, base, rows(), attachment.placeholders)
    assert math.log(found[0].scores["blue"]) != pytest.approx(math.log(plain["blue"]), abs=0.1)


def test_texts_share_their_first_tokens_and_parts_change_nothing(tiny_fast_vlm, monkeypatch):
    tree = likelihood.Tree.of([[1, 2, 9], [1, 2, 3, 9], [4, 9], [9]])
    assert tree.ids == [1, 2, 3, 4] and tree.depths == [0, 1, 2, 0]
    assert tree.ancestors == [[0], [0, 1], [0, 1, 2], [3]]
    assert tree.predictors == [[0, 1, 2], [0, 1, 2, 3], [0, 4], [0]]
    base = load_base(str(tiny_fast_vlm), device="cpu")
    predictor, sizes, logits = predictor_of(base, section()), [], likelihood._logits
    whole = predictor(rows(), title="x")
    monkeypatch.setattr(likelihood, "MOST_LOGITS", 4 * base.model.config.get_text_config().vocab_size)

    def seen(model, cached, found):
        before = cached.mask.shape[1]
        out = logits(model, cached, found)
        sizes.append(len(found.ids))
        assert all(keys.shape[-2] == before for keys, _ in cached.layers), "the rows are as they were"
        return out

    monkeypatch.setattr(likelihood, "_logits", seen)
    parts = predictor(rows(), title="x")
    alone = max(map(len, predictor.task._ids)) - 1
    assert len(set(sizes)) > 1 and max(sizes) <= max(4, alone)
    assert [one.scores for one in parts] == [pytest.approx(one.scores, abs=1e-6) for one in whole]


def test_equal_rows_go_through_the_model_once(tiny_fast_vlm, forwards):  # noqa: F811
    base = load_base(str(tiny_fast_vlm), device="cpu")
    predictor = predictor_of(base, section())
    predictor(rows()[:4], title="x")
    forwards.clear()
    twice = [*rows()[:4], *rows()[:4]]
    assert [row.images[0] is other.images[0] for row, other in zip(twice[:4], twice[4:], strict=True)] == [False] * 4
    same_images = [*twice[:4], *twice[:4]]
    found = predictor(same_images, title="x")
    assert found[:4] == found[4:] and forwards == {"whole": 1, "rest": 3}
    forwards.clear()
    predictor(twice, title="x")
    assert forwards == {"whole": 2, "rest": 6}, "pixels in memory are the same if they are one object"


def test_several_processes_predict_each_row_once(tiny_fast_vlm):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    examples = [*rows(), *rows()[:3]]
    predictor = predictor_of(base, section())
    wanted, found = predictor(examples, title="x"), {}
    for process in range(3):
        mine = {}
        why = predictor.task.predict_rows(
            base.model, predictor, examples, order=range(len(examples)), share=(process, 3), batch_size=2,
            on_prediction=mine.__setitem__,
        )  # fmt: skip
        assert why is None and mine and not mine.keys() & found.keys()
        found |= mine
    assert [found[row].scores for row in range(len(examples))] == [
        pytest.approx(one.scores, abs=1e-5) for one in wanted
    ]


def test_a_model_that_computes_a_tree_in_another_way_scores_one_by_one(tiny_fast_vlm, monkeypatch):
    base, lines = load_base(str(tiny_fast_vlm), device="cpu"), []
    right = likelihood._logits

    def wrong(model, cached, tree):
        return right(model, cached, tree) * 1.1

    monkeypatch.setattr(likelihood, "_logits", wrong)
    predictor = predictor_of(base, section(), log=lines.append)
    assert same(predictor(rows(), title="x"), base, rows())
    assert len(lines) == 1 and "the log-likelihoods of FastVlmForConditionalGeneration differ by" in lines[0]


def test_an_answer_is_the_label(tiny_fast_vlm):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    predictor, pieces = predictor_of(base, section()), []
    batch = predictor.prompt_batch(rows()[:3])
    answers = predictor.task.answer(base.model, batch, on_text=lambda row, piece: pieces.append((row, piece)))
    labels = [one.label for one in predictor.task.predict(base.model, batch)]
    assert [one.text for one in answers] == labels and pieces == list(enumerate(labels))
    assert [one.prompt_tokens for one in answers] == batch.inputs["attention_mask"].sum(dim=1).tolist()
    assert all(one.finish_reason == "stop" for one in answers)
    (constant,) = {str(predictor.task.constant([row])) for row in labelled("blue", "blue")}
    assert constant == "blue" and isinstance(predictor.task.constant(labelled("blue")), Label)


def labelled(*answers):
    return [Example(id=str(i), messages=[], media=(), answers=[one]) for i, one in enumerate(answers)]


def test_labels_of_the_same_tokens_are_refused(tiny_fast_vlm, monkeypatch):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    tokens = ClassifyTask._tokens
    monkeypatch.setattr(ClassifyTask, "_tokens", lambda self, label: tokens(self, label.replace("blue", "red")))
    with pytest.raises(DataError, match="gives 'red' and 'blue' the same. Rename one of them"):
        base.task(section())

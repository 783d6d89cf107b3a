"""Metrics of answers against other implementations and values by hand."""

import jiwer
import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein
from sklearn.feature_extraction.text import CountVectorizer

from finetune.core.example import Example
from finetune.core.prediction import Number, Text
from finetune.errors import DataError
from finetune.interfaces import CorpusMetric, RowMetric
from finetune.metrics.anls import Anls, anls
from finetune.metrics.edit_distance import edit_distance
from finetune.metrics.error_rates import Cer, Wer, error_rate
from finetune.metrics.token_overlap import TokenF1, TokenRecall, token_f1, token_recall
from finetune.metrics.vqa_accuracy import VqaAccuracy, vqa_accuracy
from finetune.tasks.vqa import VqaConfig
from tests.metrics.test_captions import PAIRS, random_rows

OPTIONS = VqaConfig()


def row(*answers):
    return Example(id="r1", messages=[], media=(), answers=list(answers))


def pairs(seed):
    captions, references = random_rows(seed, most_references=1)
    return captions, [one for (one,) in references]


def letters(seed, *, most=90):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice([*"abcdé 日"]) for _ in range(rng.integers(0, most))) for _ in range(PAIRS)]


def test_the_edit_distance_equals_that_of_rapidfuzz():
    for one, other in zip(letters(1), letters(2), strict=True):
        near = one[: len(one) // 2] + other[:3] + one[len(one) // 2 + 2 :]
        for text in (other, near, one):
            assert edit_distance(one, text) == Levenshtein.distance(one, text), (one, text)


@pytest.mark.parametrize(("metric", "other"), [(Cer, jiwer.cer), (Wer, jiwer.wer)])
def test_error_rates_equal_those_of_jiwer(metric, other):
    answers, references = pairs(3)
    alone = [error_rate([a], [[r]], of_words=metric.of_words) for a, r in zip(answers, references, strict=True)]
    assert alone == pytest.approx([other(r, a) for a, r in zip(answers, references, strict=True)], abs=1e-6)
    found = metric(OPTIONS)
    whole = found.corpus([Text(text=text.upper()) for text in answers], [row(reference) for reference in references])
    assert whole == pytest.approx(other(references, answers), abs=1e-6)
    assert isinstance(found, CorpusMetric) and not isinstance(found, RowMetric) and not found.higher_is_better


def test_error_rates_by_hand():
    assert error_rate(["a b", "x"], [["a c"], ["a b c d"]], of_words=True) == 5 / 6, "of all words, not a mean of rows"
    assert error_rate(["ab"], [["xyz", "abcdefgh"]], of_words=False) == 6 / 8, "not 3 / 3: the fewest for its length"
    assert error_rate(["a b c"], [["a"]], of_words=True) == 2.0, "an answer may be too long by more than its reference"


def test_anls_equals_the_similarity_of_rapidfuzz():
    near = 0
    for one, other in zip(letters(4, most=9), letters(5, most=9), strict=True):
        text = one[:-1] + other[:1] if len(other) % 2 else other
        wanted = Levenshtein.normalized_similarity(one, text)
        assert anls(one, [text]) == pytest.approx(wanted if wanted >= 0.5 else 0.0, abs=1e-6)
        near += 0.5 <= wanted < 1
    assert near > PAIRS / 10


def test_anls_by_hand():
    metric = Anls(OPTIONS)
    assert metric.best_value == 1 and isinstance(metric, RowMetric)
    # 1 of 5 letters differs; of the other reference, 4 of 5.
    assert metric.row(Text(text=" Total"), row("xxxal", "totel")) == pytest.approx(1 - 1 / 5)
    assert metric.row(Text(text="ab"), row("abcd")) == 0.5, "the threshold itself counts, as in the DocVQA evaluation"
    assert metric.row(Text(text="ab"), row("abcde")) == 0.0


def test_overlaps_equal_those_of_counted_vectors():
    answers, references = pairs(6)
    counts = CountVectorizer(token_pattern=r"\S+").fit([*answers, *references])
    own, other = counts.transform(answers).toarray(), counts.transform(references).toarray()
    common = np.minimum(own, other).sum(axis=1)
    with np.errstate(invalid="ignore"):
        precision, recall = common / own.sum(axis=1), common / other.sum(axis=1)
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    for i, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        assert token_recall(answer, reference) == pytest.approx(recall[i], abs=1e-6)
        assert token_f1(answer, reference) == pytest.approx(f1[i], abs=1e-6)


def test_overlaps_by_hand():
    answer = Text(text="The lesion is in the LEFT lung.")  # 7 words
    recall, f1 = TokenRecall(OPTIONS), TokenF1(OPTIONS)
    assert recall.best_value == f1.best_value == 1 and isinstance(recall, RowMetric)
    assert recall.row(answer, row("left lung", "the right lung")) == 1.0
    assert f1.row(answer, row("left lung", "the right lung")) == pytest.approx(2 * 2 / (7 + 2))
    assert recall.row(answer, row("left, left")) == 1 / 2, "a word counts as often as it occurs"
    assert recall.row(Text(text=""), row("left")) == f1.row(answer, row("...")) == 0.0
    # Without articles, 5 words are left.
    assert TokenF1(VqaConfig(answer_normalization="vqa")).row(answer, row("left lung")) == pytest.approx(4 / 7)


def as_the_script(answer, answers):
    """The accuracy by the steps of the official script: each annotator's answer is compared with the others."""
    found = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        found.append(min(1.0, float(len([other for other in others if other == answer])) / 3))
    return float(sum(found)) / len(found)


def test_vqa_accuracy_equals_the_steps_of_the_script():
    rng = np.random.default_rng(7)
    for _ in range(PAIRS):
        answers = [str(rng.choice(["red", "blue", "dark blue"])) for _ in range(rng.integers(2, 11))]
        assert vqa_accuracy("red", answers) == pytest.approx(as_the_script("red", answers), abs=1e-6)


@pytest.mark.parametrize(("matches", "wanted"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_annotators(matches, wanted):
    """The known values: 3 of 10 give .9, since leaving one of the three out leaves two."""
    metric = VqaAccuracy(OPTIONS)
    answers = ["Two"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert metric.row(Text(text="the 2."), row(*answers)) == pytest.approx(wanted)


def test_vqa_accuracy_needs_several_annotators():
    metric = VqaAccuracy(OPTIONS)
    assert metric.row(Text(text="red"), row("red")) is None and metric.best_value == 1
    assert metric.row(Text(text="red"), row("red", "red")) == pytest.approx(1 / 3)


@pytest.mark.parametrize("metric", [Anls, Cer, Wer, TokenF1, TokenRecall, VqaAccuracy])
def test_a_prediction_without_a_text_is_refused(metric):
    found = metric(OPTIONS)
    with pytest.raises(DataError, match=rf"{found.key} needs a text or a label, got .* type number \(row r1\)"):
        found.row(Number(value=1), row("1")) if hasattr(found, "row") else found.corpus([Number(value=1)], [row("1")])

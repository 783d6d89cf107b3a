"""BLEU, ROUGE-L and CIDEr-D against other implementations, values by hand, and a restatement of the formula."""

import math
from collections import Counter

import numpy as np
import pytest
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics import BLEU

from finetune.core.example import Example
from finetune.core.prediction import Label, Number, Text
from finetune.errors import DataError
from finetune.interfaces import CorpusMetric, RowMetric
from finetune.metrics.bleu import Bleu1, Bleu4, bleu
from finetune.metrics.cider_d import CiderD, cider_d
from finetune.metrics.rouge_l import RougeL, rouge_l
from finetune.metrics.texts import words

PAIRS = 1000
FEW_WORDS = "a red small square on the left of two large blue circles".split()


def random_text(rng, *, least=1, most=14):
    return " ".join(rng.choice(FEW_WORDS) for _ in range(rng.integers(least, most)))


def random_rows(seed, *, pairs=PAIRS, most_references=5):
    """Return captions and 1 to 5 references for each; half of the captions share most words with one of these."""
    rng = np.random.default_rng(seed)
    references = [[random_text(rng) for _ in range(rng.integers(1, most_references + 1))] for _ in range(pairs)]
    captions = []
    for row in references:
        own = random_text(rng, least=0).split()
        kept = str(rng.choice(row)).split()
        captions.append(" ".join(kept[: rng.integers(1, len(kept) + 1)] + own[:3] if rng.random() < 0.5 else own))
    return captions, references


def examples(references):
    return [Example(id=str(i), messages=[], media=(), answers=row) for i, row in enumerate(references)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A man's T-shirt, on the left.", "a man 's t-shirt on the left"),
        ("They don’t sit -- they stand!", "they do n't sit they stand"),
        ("It costs $3,000.50 (or 12:30)?", "it costs 3,000.50 or 12:30"),
        ("a cat,a dog\n\tand 'the' \"bird\"...", "a cat a dog and the bird"),
        ("CAFE\u0301 Größe", "café größe"),
        ("?! -- ...", ""),
    ],
)
def test_the_words_of_a_caption(text, wanted):
    assert words(text) == wanted.split()


@pytest.mark.parametrize("order", [1, 4])
def test_bleu_equals_sacrebleu(order):
    captions, references = random_rows(1)
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(5)]
    other = BLEU(tokenize="none", smooth_method="none", max_ngram_order=order, force=True)
    assert bleu(captions, references, order=order) == pytest.approx(
        other.corpus_score(captions, streams).score / 100, abs=1e-6
    )
    alone = [bleu([text], [row], order=order) for text, row in zip(captions, references, strict=True)]
    wanted = [
        other.corpus_score([text], [[reference] for reference in row]).score / 100
        for text, row in zip(captions, references, strict=True)
    ]
    assert alone == pytest.approx(wanted, abs=1e-6) and sum(value > 0 for value in alone) > PAIRS / 10


def test_bleu_by_hand():
    # Two of three words are right, "the" once since the reference has it once, and no brevity penalty: 3 words to 3.
    assert bleu(["the the cat"], [["the cat sat"]], order=1) == pytest.approx(2 / 3)
    # The references have 2 and 4 words, the caption 3: the shorter one counts, so no penalty either.
    assert bleu(["a red cat"], [["a cat", "a red cat sits"]], order=1) == 1.0
    assert bleu(["a red"], [["a red cat sits"]], order=1) == pytest.approx(math.exp(1 - 4 / 2))
    assert bleu(["a cat", ""], [["a cat"], ["a dog"]], order=1) == pytest.approx(math.exp(1 - 4 / 2))
    assert bleu(["", "a"], [["a"], ["a"]], order=4) == 0.0, "no n-gram of two words"


def test_rouge_l_equals_the_f_measure_of_the_longest_common_subsequence():
    captions, references = random_rows(2)

    def wanted(text, reference):
        one, other = text.split(), reference.split()
        common = LCSseq.similarity(one, other)
        if not common:
            return 0.0
        precision, recall = common / len(one), common / len(other)
        return 2 * precision * recall / (precision + recall)

    for text, row in zip(captions, references, strict=True):
        assert rouge_l(text, row) == pytest.approx(max(wanted(text, reference) for reference in row), abs=1e-6)


def test_rouge_l_by_hand():
    # The usual example of Lin 2004: "police the gunman" and "police killed the gunman" share three words of 3 and 4.
    assert rouge_l("police the gunman", ["police killed the gunman"]) == pytest.approx(2 * 3 / 7)
    assert rouge_l("the gunman police", ["police killed the gunman", "the"]) == pytest.approx(4 / 7)
    assert rouge_l("", ["a"]) == rouge_l("a", ["..."]) == 0.0


def restated(captions, references):
    """CIDEr-D of each row, from the formulas of the paper: one vector for each text and length of n-grams."""

    def grams(text, n):
        tokens = text.split()
        return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))

    documents = [{gram for one in row for n in (1, 2, 3, 4) for gram in grams(one, n)} for row in references]
    known = {}

    def vector(text, n):
        found = {}
        for gram, count in grams(text, n).items():
            if gram not in known:
                known[gram] = math.log(len(references) / max(1, sum(gram in document for document in documents)))
            found[gram] = count * known[gram]
        return found

    def length(one):
        return math.sqrt(sum(value**2 for value in one.values()))

    rows = []
    for text, row in zip(captions, references, strict=True):
        of_orders = []
        for n in (1, 2, 3, 4):
            total = 0.0
            for reference in row:
                one, other = vector(text, n), vector(reference, n)
                clipped = sum(min(value, other[gram]) * other[gram] for gram, value in one.items() if gram in other)
                apart = len(text.split()) - len(reference.split())
                if length(one) and length(other):
                    total += math.exp(-(apart**2) / (2 * 6**2)) * clipped / (length(one) * length(other))
            of_orders.append(10 / len(row) * total)
        rows.append(sum(of_orders) / 4)
    return rows


def test_cider_d_equals_a_restatement_of_the_paper():
    values, wanted = [], []
    for seed in range(20):
        captions, references = random_rows(seed, pairs=PAIRS // 20)
        values += cider_d(captions, references)
        wanted += restated(captions, references)
    assert len(values) == PAIRS and values == pytest.approx(wanted, abs=1e-6)
    assert sum(value > 0.5 for value in wanted) > PAIRS / 10


def test_cider_d_by_hand():
    """Every n-gram but ``a`` is in one of two rows, so its idf is log 2, and that of ``a`` is 0."""
    references = [["a cat"], ["a dog"]]
    # One of four lengths of n-grams: cat. Another one: a cat. There are no longer ones, which count as 0.
    assert cider_d(["a cat", "a cat"], references) == pytest.approx([10 * 2 / 4, 0.0])
    # cat is there twice and counts once: 1 * 1 / (2 * 1). Of a cat and cat cat, one is right: 1 / sqrt(2).
    wanted = 10 * (1 / 2 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert cider_d(["a cat cat", ""], references) == pytest.approx([wanted, 0.0])
    # The mean over references: the second one has nothing in common.
    assert cider_d(["a cat", "a"], [["a cat", "one two"], ["a dog"]]) == pytest.approx([10 * 2 / 4 / 2, 0.0])
    assert cider_d(["a cat"], [["a cat"]]) == [0.0], "all words are in every row"


def test_metrics_of_captions_take_rows():
    captions, references = random_rows(4, pairs=60)
    predictions = [Text(text=text.upper() + ".") for text in captions]
    rows = examples(references)
    cider = CiderD(None)
    for metric, wanted in (
        (Bleu1(None), bleu(captions, references, order=1)),
        (Bleu4(None), bleu(captions, references, order=4)),
        (cider, np.mean(cider_d(captions, references))),
        (cider, np.mean(cider_d(captions, references))),
    ):
        assert isinstance(metric, CorpusMetric) and not isinstance(metric, RowMetric) and metric.higher_is_better
        assert metric.corpus(predictions, rows) == pytest.approx(wanted, abs=1e-12)
    drawn = [3, 3, 5, 50, 7, 7, 7]  # a draw of the bootstrap, which may have rows twice
    part = [captions[i] for i in drawn], [references[i] for i in drawn]
    assert cider.corpus([predictions[i] for i in drawn], [rows[i] for i in drawn]) == pytest.approx(
        np.mean(cider_d(*part)), abs=1e-12
    )
    rouge = RougeL(None)
    assert isinstance(rouge, RowMetric) and not isinstance(rouge, CorpusMetric) and rouge.best_value == 1
    assert rouge.row(predictions[0], rows[0]) == rouge_l(captions[0], references[0])
    assert rouge.row(Label(label="a cat", scores={}), examples([["a cat"]])[0]) == 1


@pytest.mark.parametrize("metric", [Bleu1, Bleu4, CiderD, RougeL])
def test_a_prediction_without_a_text_is_refused(metric):
    (row,) = examples([["a cat"]])
    found = metric(None)
    with pytest.raises(DataError, match=rf"{found.key} needs a text or a label, got .* type number \(row 0\)"):
        found.row(Number(value=1), row) if hasattr(found, "row") else found.corpus([Number(value=1)], [row])

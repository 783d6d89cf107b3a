"""Which answers count as equal, against values worked out by hand."""

import pytest

from finetune.metrics.exact_match import exact_match
from finetune.metrics.normalization import equal_answers, normalize_vqa, normalizer

DIFFERENT = [
    ("+", "-"), (">5", "<5"), ("-1", "1"), ("1,5", "15"), ("hepatitis A", "hepatitis"), ("none", "0"), ("two", "2"),
    ("the who", "who"), ("A", "an a"), ("c++", "c"), ("3.", "3"), ("β-blocker", "β blocker"), ("'", "’"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_exact_distinguishes_different_answers(one, other):
    assert not exact_match(one, [other], normalize=normalizer("exact"))
    assert exact_match(one, [other, one], normalize=normalizer("exact"))


@pytest.mark.parametrize(
    ("one", "other"),
    [("Yes", "yes"), ("  no\n", "no"), ("caf\u00e9", "cafe\u0301"), ("CAFE\u0301", "caf\u00e9"), ("\u00c5", "A\u030a")],
)
@pytest.mark.parametrize("name", ["exact", "number"])
def test_case_outer_white_space_and_composition_do_not_count(name, one, other):
    assert exact_match(one, [other], normalize=normalizer(name))


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("5", "5.0", True),
        ("+5", "5", True),
        ("-1", "1", False),
        ("\u22121", "-1", True),
        ("1,000", "1000", True),
        ("1,5", "15", False),
        ("1,5", "1.5", False),
        ("1 000 000", "1e6", True),
        ("1,000 000", "1e6", False),
        (".5", "0.50", True),
        ("-0", "0", True),
        ("0.1", "0.10000000000000001", False),
        (">5", "5", False),
        ("5 cm", "5", False),
        ("none", "0", False),
        ("two", "2", False),
        (".", "", False),
        ("-", "0", False),
        ("1e9999", "1e9998", False),
        ("1e99999", "1E99999", True),  # no number any more, but the same text
        ("1" * 5000, "1" * 5000 + ".0", True),
        ("1" * 50, "1" * 49 + "2", False),
        ("1200", "1.2e3", True),
        ("007", "7", True),
    ],
)
def test_number_compares_values(one, other, equal):
    assert exact_match(one, [other], normalize=normalizer("number")) is equal


def test_the_decimal_separator_is_stated():
    german = normalizer("number", decimal_separator=",")
    assert german("1,5") == normalizer("number")("1.5")
    assert german("1.000,5") == normalizer("number")("1,000.5")
    assert german("1.5") != german("15")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The red car.", "red car"),
        ("Two", "2"),
        ("  yes,\n", "yes"),
        ("an X-ray", "x ray"),
        ("3.5 cm", "3.5 cm"),
        ("1,000", "1000"),
        ("don't", "dont"),
        ("none", "0"),
        ("A", "a"),
        ("+", ""),
        ("", ""),
    ],
)
def test_the_rules_of_vqa(text, normal):
    assert normalize_vqa(text) == normal


def test_answers_that_become_equal_are_listed():
    answers = ["yes", "+", "No", "-", "no", "+"]
    assert equal_answers(answers, normalize=normalizer("vqa")) == [["+", "-"], ["No", "no"]]
    assert equal_answers(answers, normalize=normalizer("exact")) == [["No", "no"]]


def test_unknown_rules_are_an_error():
    with pytest.raises(ValueError, match="one of exact, vqa, number, got 'vga'"):
        normalizer("vga")

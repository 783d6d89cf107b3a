"""Normalization of answers before they are compared.

=========  =====================================================================================================
exact      Unicode's NFC form, lower case, without outer white space; every character counts
vqa        the rules of the VQA evaluation script, for its benchmarks; much punctuation does not count
number     the value of a number, with its sign; any other text as with ``exact``
=========  =====================================================================================================
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

Normalization = Literal["exact", "vqa", "number"]
DecimalSeparator = Literal[".", ","]
Normalizer = Callable[[str], str]

MINUS = "\u2212"  # the typographic one

_NUMBERS = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())} | {
    "none": "0"
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = r";/[]\"{}()=+\_-><@`,?!"


def normalizer(normalization: Normalization, *, decimal_separator: DecimalSeparator = ".") -> Normalizer:
    """Return the function that normalizes answers before they are compared.

    Args:
        normalization: the name of the rules.
        decimal_separator: the mark before the fraction of a number; ``number`` alone uses it.
    """
    match normalization:
        case "exact":
            return normalize_exact
        case "vqa":
            return normalize_vqa
        case "number":
            return lambda text: normalize_number(text, decimal_separator=decimal_separator)
    raise ValueError(f"normalization must be one of {', '.join(get_args(Normalization))}, got {normalization!r}")


def normalize_exact(text: str) -> str:
    """Return the text in NFC and lower case, without white space around it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower()).strip()


def normalize_number(text: str, *, decimal_separator: DecimalSeparator = ".") -> str:
    """Return the value of a text that is one number, in its shortest form; any other text as ``normalize_exact``.

    ``+5.0``, ``5`` and ``5e0`` are equal, ``-5`` and ``5`` are not. Groups of three digits may be separated by a space,
    an apostrophe, or the mark that is not the decimal separator.

    Args:
        text: the text of the answer.
        decimal_separator: the mark before the fraction of a number.
    """
    plain = normalize_exact(text)
    group = r"[\u0020\u00a0\u202f'’" + (r"," if decimal_separator == "." else r".") + "]"
    number = re.fullmatch(
        rf"([+\-{MINUS}]?)(\d{{1,3}}(?:({group})\d{{3}}(?:\3\d{{3}})*)|\d*)(?:{re.escape(decimal_separator)}(\d+))?"
        r"(?:e([+-]?\d{1,4}))?",
        plain,
    )
    if number is None or not (number[2] or number[4]):
        return plain
    fraction = number[4] or ""
    digits = (re.sub(r"\D", "", number[2]) + fraction).lstrip("0")
    if not digits:
        return "0"
    significant = digits.rstrip("0")
    exponent = int(number[5] or 0) - len(fraction) + len(digits) - len(significant)
    return f"{'-' if number[1] in ('-', MINUS) else ''}{significant}e{exponent}"


def normalize_vqa(text: str) -> str:
    """Return an answer as the VQA evaluation compares it: without case, punctuation, articles and number words.

    After https://github.com/GT-Vision-Lab/VQA (PythonEvaluationTools/vqaEvaluation/vqaEval.py), except that
    apostrophes are dropped where that script restores missing ones.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip().lower().replace("'", "").replace("’", "")
    has_digit_comma = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        glued = f"{mark} " in text or f" {mark}" in text or has_digit_comma
        text = text.replace(mark, "" if glued else " ")
    text = re.sub(r"(?<!\d)\.(?!\d)|\.$|\.(?=\s)", "", text).rstrip(":")
    words = [_NUMBERS.get(word, word) for word in text.split()]
    # An answer of one article, such as A among A, B, C and D, stays.
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words)


def equal_answers(answers: Iterable[str], *, normalize: Normalizer) -> list[Sequence[str]]:
    """Return the groups of different answers that ``normalize`` maps to one text, each in the order of the answers."""
    groups: dict[str, dict[str, None]] = {}
    for answer in answers:
        groups.setdefault(normalize(answer), {})[answer] = None
    return [list(group) for group in groups.values() if len(group) > 1]

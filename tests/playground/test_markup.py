"""The page's own HTML: nothing of what others wrote becomes a part of it, and what differs is marked."""

import re

from finetune.playground.answers import Answer
from finetune.playground.catalog import CatalogEntry
from finetune.playground.markup import MAX_ROWS, alert, cards, milliseconds, table
from tests.hostile_text import harms_in

EVIL = "\x1b[2J\u202e<script>alert(1)</script>'\"&"
SUMMARY = {
    "domain": "medical",
    "task": "vqa",
    "method": "lora",
    "synthetic": True,
    "metrics": {
        "base": {"exact_match": 0.129, "n": 800, "majority.exact_match": 0.492},
        "test": {"exact_match": 0.922, "n": 800, "majority.exact_match": 0.492},
    },
}


def entry(name="medical/phantoms", **fields):
    known = {"ref": f"{name}@3", "name": name, "version": 3, "aliases": ("latest", "prod"), "summary": SUMMARY}
    return CatalogEntry(**{**known, "signature": "signed by release", "refusal": None, **fields})


def text_of(markup):
    return " ".join(re.sub("<[^>]*>", " ", markup).split())


def test_what_differs_from_the_base_is_marked():
    base = Answer(entry=None, text="yes", answer_ms=51)
    same = Answer(entry=entry(), text=" yes", was_loaded=True, ready_ms=1234, answer_ms=9)
    other = Answer(entry=entry("retail/products", version=None), text="no", ready_ms=0.082, answer_ms=40)
    shown = text_of(cards("Is it?", [base, same, other], waiting=[entry("x/y")], right=None))
    assert shown == (
        "Is it? base no adapter yes answered in 51 ms "
        "medical/phantoms version 3 yes same as the base loaded and checked in 1.2 s answered in 9.00 ms "
        "retail/products no differs from the base switched in 0.08 ms answered in 40 ms "
        "x/y version 3 answering …"
    )


def test_right_and_wrong_where_that_is_known():
    answers = [Answer(entry=None, text="3"), Answer(entry=entry(), text="The Four")]
    shown = text_of(cards("How many?", answers, right="four"))
    assert "image: four base no adapter 3 ✗ , wrong" in shown
    assert "The Four ✓ , right" in shown
    assert "right" not in text_of(cards("How many?", answers, right=None))


def test_no_answer_shows_the_reason_and_is_not_compared():
    failed = Answer(entry=None, error="the base is gone")
    shown = text_of(cards("Q", [failed, Answer(entry=entry(), text="yes")], right=None))
    assert "No answer. the base is gone" in shown and "the base answered" not in shown
    assert "differs" not in shown and "same as" not in shown


def test_the_table_has_the_scores_and_the_reason():
    shown = text_of(table([entry(), entry("a/b", refusal="trained on another base")], where="here"))
    assert "medical/phantoms version 3 @latest @prod medical · vqa · lora synthetic images 0.129 → 0.922" in shown
    assert "800 test rows of its own data; the commonest answer alone reaches 0.492 signed by release fits" in shown
    assert shown.endswith("cannot be chosen trained on another base")
    not_evaluated = entry(summary={"domain": "d", "task": "vqa", "method": "lora", "metrics": {}}, version=None)
    assert "folder @latest @prod d · vqa · lora not evaluated - signed by release fits" in text_of(
        table([not_evaluated], where="here")
    )
    assert "There are no adapters in s3://b/p." in table([], where="s3://b/p")


def test_every_metric_is_shown_by_its_name():
    test = {"rouge_l": 0.5, "mean_error": 12.5, "majority.rouge_l": 0.1, "majority.mean_error": 40.0, "n": 7}
    both = entry(summary=SUMMARY | {"metrics": {"base": {"rouge_l": 0.25}, "test": test}})
    shown = table([both], where="here")
    assert "rouge l 0.250 → 0.500 mean error 12.500 7 test rows of its own data signed" in text_of(shown)
    assert shown.count("style='width: ") == 2, "a bar is drawn of shares alone"


def test_a_large_registry_is_not_one_large_page():
    shown = table([entry(f"a/b{i}") for i in range(MAX_ROWS + 3)], where="here")
    assert shown.count("<tr ") == MAX_ROWS
    assert "3 more are not shown. Name some: finetune app" in shown


def test_nothing_that_others_wrote_becomes_markup():
    evil = entry(EVIL, aliases=(EVIL,), signature=EVIL, refusal=EVIL, summary=SUMMARY | {"domain": EVIL, "task": EVIL})
    answers = [Answer(entry=None, text=EVIL), Answer(entry=evil, text=EVIL * 9), Answer(entry=evil, error=EVIL)]
    everything = cards(EVIL, answers, waiting=[evil], right=EVIL) + table([evil], where=EVIL) + alert(EVIL)
    everything += table([], where=EVIL)
    assert "<script" not in everything and everything.count("&lt;script&gt;") >= 20
    assert EVIL[-3:] not in everything
    assert harms_in(everything) == []


def test_durations_for_people():
    assert [milliseconds(value) for value in (0.084, 9.96, 43.4, 2149)] == ["0.08 ms", "9.96 ms", "43 ms", "2.1 s"]

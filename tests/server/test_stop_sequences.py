"""A stop text ends an answer wherever its pieces are cut."""

import itertools

import pytest

from finetune.server.stop_sequences import StopSequences


def cut(text, places):
    """Yield the text in pieces that end at these places."""
    for start, end in itertools.pairwise([0, *places, len(text)]):
        if start != end:
            yield text[start:end]


@pytest.mark.parametrize("stops", [["END"], ["aab"], ["ab", "b"], ["aaa", "never"], ["x" * 20], []])
def test_however_it_is_cut_the_same_comes_out(stops):
    text = "aabaaab ENEND b"
    found = [text.index(stop) for stop in stops if stop in text]
    wanted = text[: min(found)] if found else text
    for count in range(4):
        for places in itertools.combinations(range(1, len(text)), count):
            stop = StopSequences(stops)
            out = [stop.feed(piece) for piece in cut(text, places)]
            assert "".join(out) + stop.rest() == wanted, places
            assert stop.found == bool(found)


def test_nothing_is_held_back_that_cannot_be_a_stop_text():
    stop = StopSequences(["END"])
    assert [stop.feed(piece) for piece in ("a", "bE", "N", "x", "E")] == ["a", "b", "", "ENx", ""]
    assert stop.rest() == "E"

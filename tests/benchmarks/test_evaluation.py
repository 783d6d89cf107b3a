"""The benchmark of evaluations on a model of a few layers: what it writes, and that it would notice another answer."""

import json

import pytest

from benchmarks.evaluation import main, measure, ratios
from benchmarks.measure import BenchmarkError
from tests.matrix import rows


def test_every_part_is_measured_on_all_sides(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", "")  # the benchmark has a place of its own
    file = tmp_path / "evaluation.json"
    few = ["--models", "tiny", "--images", "4", "--lengths", "short", "--rounds", "1"]
    assert main([*few, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    (details,) = found.pop("details")["models"].values()
    parts = ("images", "blank", "evaluation")
    assert set(found) == {f"{who}_vs_plain_tiny_short_{part}" for who in ("batches", "ours") for part in parts}
    assert details["rows"] == {"images": 8, "blank": 8} and details["batch_size"] == 4
    assert all(
        len(each) == 1 and each[0] > 0 for ways in details["seconds"]["short"].values() for each in ways.values()
    )
    assert "8 rows about 4 images, then 8 with blank ones" in capsys.readouterr().out


def test_another_answer_is_an_error():
    ways = {"plain": lambda rows: ["red"] * len(rows), "ours": lambda rows: ["red", "blue"][: len(rows)]}
    assert measure({"plain": ways["plain"]}, rows(2), rounds=1)["plain"]
    with pytest.raises(BenchmarkError, match="row 1: all ways must give one answer, got 'red'; ours: 'blue'"):
        measure(ways, rows(2), rounds=1)


def test_ratios_are_medians_of_the_rounds_and_of_both_parts():
    images = {"plain": [6.0, 8.0, 10.0], "ours": [2.0, 4.0, 2.0]}
    blank = {"plain": [6.0, 4.0, 2.0], "ours": [1.0, 2.0, 2.0]}
    found = ratios("a", {"short": {"images": images, "blank": blank}})
    assert found == {
        f"ours_vs_plain_a_short_{part}": value for part, value in {"blank": 2, "evaluation": 3, "images": 3}.items()
    }

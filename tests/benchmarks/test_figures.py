"""What the benchmark makes of what it measured."""

import pytest

from benchmarks.gate import Round
from benchmarks.measure import BenchmarkError, Measured
from benchmarks.results import check_same_work, figures, table


def measured(seconds, **changes):
    """A contestant that took ``seconds`` for each of two steps a round, but for one slow round."""
    rounds = [
        Round(seconds=2 * s, cpu_seconds=4 * s, losses=[3.0, 2.0], supervised=[48, 48]) for s in (seconds, 99, seconds)
    ]
    values = {
        "rounds": rounds,
        "losses": [4.0, 3.0, 2.0],
        "trainable": 100,
        "supervised": [48, 48, 48],
        "fill_seconds": 0.0,
        "peak_bytes": 1000,
        "training_peak_bytes": 900,
        "cuda_bytes": 2**30,
        "flops": 4e12,
    }
    return Measured(**values | changes)


def test_figures_are_ratios_of_medians():
    results = {
        "a": {"trl": measured(3.2), "bare": measured(1.9), "ours": measured(2.0)},
        "b": {
            "trl": measured(5.0),
            "ours": measured(4.0, peak_bytes=900),
            "stored": measured(1.0, fill_seconds=12.0, peak_bytes=1100, losses=[4.0, 3.0, 2.5]),
            "floor": measured(0.9),
        },
        "b4": {"trl": measured(12.0), "stored": measured(2.0)},
    }
    found = figures(results, num_rows={"a": 32, "b": 16, "b4": 16}, batch_sizes={"a": 16, "b": 4, "b4": 4})
    assert found == pytest.approx(
        {
            "uncached_vs_trl": 1.6,
            "uncached_vs_bare": 0.95,
            "stored_vs_trl": 5.0,
            "stored_vs_trl_4_tiles": 6.0,
            "stored_vs_floor": 0.9,
            "three_epochs_vs_trl": 12 * 5.0 / (12.0 + 12 * 1.0),
            "memory_vs_trl": 1.1,
            "max_loss_difference": 0.5,
        }
    )
    text = table(results, found, titles={"a": "A", "b": "B", "b4": "C"})
    assert "memory_vs_trl                  1.1  <= 1: no" in text
    assert "stored_vs_floor                0.9  >= 0.9: yes" in text


def test_a_gpu_has_columns_of_its_own():
    text = table({"b": {"trl": measured(2.0)}}, {}, titles={"b": "B"}, peak_tflops=10.0)
    assert "GPU GiB    MFU" in text
    assert "1.00  20.0%" in text


def test_what_was_not_measured_has_no_figure():
    assert figures({"a": {"trl": measured(1.0)}}, num_rows={"a": 32}, batch_sizes={"a": 16}) == {}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trainable": 101}, "must train as many parameters, got"),
        ({"supervised": [48, 47, 48]}, "each step of a contestant must supervise 48 tokens"),
        ({"losses": [4.1, 3.0, 2.0]}, "the first losses must differ by at most"),
    ],
)
def test_other_work_is_refused(changes, message):
    with pytest.raises(BenchmarkError, match=message):
        check_same_work("a", {"ours": measured(1.0), "trl": measured(1.0, **changes)}, batch_size=2, tolerance=1e-4)

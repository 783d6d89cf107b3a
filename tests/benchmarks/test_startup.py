"""The benchmark of starts on a model of a few layers: what it writes, and that a command that fails is no figure."""

import json

import pytest

from benchmarks.measure import BenchmarkError
from benchmarks.startup import _read_plan, _read_to_the_end, main, start


@pytest.mark.slow
def test_every_case_is_measured_on_both_sides(tmp_path, capsys):
    file = tmp_path / "startup.json"
    with pytest.MonkeyPatch.context() as patch:  # the benchmark has places of its own
        for name in (
            "FINETUNE_CACHE",
            "FINETUNE_REGISTRY",
            "OMP_NUM_THREADS",
            "HF_HUB_OFFLINE",
            "TOKENIZERS_PARALLELISM",
        ):
            patch.setenv(name, "1")
        assert main(["--model", "tiny", "--rounds", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    times = found.pop("details")["seconds"]
    assert set(times) == {"ask", "train", "serve"} and all(value > 0 for value in found.values())
    assert all(len(spent) == 1 for case in times.values() for spent in case.values())
    assert "serve_vs_floor" in capsys.readouterr().out


@pytest.mark.parametrize("wait", [_read_to_the_end, _read_plan])
def test_a_command_that_fails_is_no_figure(wait, tmp_path):
    with pytest.raises(BenchmarkError, match="No module named benchmarks.none"):
        start(("benchmarks.none",), wait, tmp_path / "log")


def test_cases_must_be_known(capsys):
    with pytest.raises(SystemExit):
        main(["--cases", "ask,sleep"])
    assert "--cases must be of ask, train and serve" in capsys.readouterr().err

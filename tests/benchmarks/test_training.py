"""The whole benchmark on a model of a few layers."""

import json

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def trl():
    pytest.importorskip("trl", reason="the peer that is measured: pip install -e '.[bench]'")


def test_all_contestants_do_the_same_work(tmp_path, capsys):
    from benchmarks.training import main

    file = tmp_path / "figures.json"
    assert main(["--models", "tiny", "--rounds", "2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["memory_vs_trl"] > 0
    assert "max_loss_difference" in found
    contestants = found["details"]["models"]["tiny"]["contestants"]
    assert set(contestants) == {"trl", "bare", "ours", "stored", "floor"}
    for one in contestants.values():
        assert len(one["losses"]) == 6  # two steps of three rounds
        assert one["losses"][-1] < one["losses"][0]
        assert one["supervised_per_step"] == 48
        assert one["peak_bytes"] > one["training_peak_bytes"] * 0.5 > 0
        # All start from the same LoRA but for its random A, see the same rows in the same order, and take equal steps.
        assert one["losses"] == pytest.approx(contestants["ours"]["losses"], abs=0.05)
    assert "memory_vs_trl" in capsys.readouterr().out


def test_a_contestant_that_fails_is_reported_with_its_own_error(tmp_path, monkeypatch):
    from benchmarks.measure import BenchmarkError
    from benchmarks.training import main

    monkeypatch.setattr("benchmarks.training.write_rows", lambda folder, *rest, **more: folder)
    with pytest.raises(BenchmarkError, match=r"bare could not be measured: DataError: .*train.jsonl"):
        main(["--models", "tiny", "--only", "bare"])

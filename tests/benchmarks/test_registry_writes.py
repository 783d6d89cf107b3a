import json

import pytest

from benchmarks import registry_writes


@pytest.mark.distributed
def test_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", "")
    words = ["--history", "20", "--names", "30", "--rounds", "8", "--folder", tmp_path, "--json", tmp_path / "figures"]
    assert registry_writes.main([str(word) for word in words]) == 0
    figures = json.loads((tmp_path / "figures").read_text())
    assert figures.pop("details")["history"] == 20
    assert set(figures) == {
        "publish_ms",
        "alias_ms",
        "publish_20_vs_1",
        "alias_20_vs_1",
        "publishes_per_second_by_1",
        "publishes_per_second_by_8",
        "list_30_cold_in_process",
        "list_30_warm_in_process",
        "list_30_seconds",
    }
    assert all(value > 0 for value in figures.values())
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]

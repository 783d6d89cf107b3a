"""Every family and every method: attach, learn, save, reload in a fresh process, merge; the base bit-equal throughout.

By default one row a family and one a method; the whole product is `slow`, and is what docs/support.md is made of.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from tests.matrix import METHODS, UNMERGED, reload_cell, train_cell
from tests.support import REFUSED, read_table, support_table
from tests.tiny import FAMILIES

ROOT = Path(__file__).parents[2]
ROWS = [(family, "lora") for family in FAMILIES] + [("qwen2_5_vl", method) for method in METHODS if method != "lora"]
PRODUCT = [(family, method, q) for family in FAMILIES for method in METHODS for q in (None, "4bit", "8bit")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family -> the folder of its tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    return {family: save(folder / family) for family, save in FAMILIES.items()}


def reload_in_a_fresh_process(cells: list[dict], folder: Path) -> list[dict]:
    file = folder / "cells.json"
    file.write_text(json.dumps(cells))
    code = f"from tests.matrix import reload_all; reload_all({str(file)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=900)
    return json.loads(file.with_suffix(".found.json").read_text())


def test_one_row_a_family_and_one_a_method(bases, tmp_path):
    cells = []
    for family, method in ROWS:
        folder = tmp_path / family / method
        folder.mkdir(parents=True)
        cells.append(train_cell(bases[family], METHODS[method], folder))
    for (family, method), found in zip(ROWS, reload_in_a_fresh_process(cells, tmp_path), strict=True):
        assert found["reloaded"], f"{family} {method}: after reloading logits differ by {found['off']}"
        if method not in UNMERGED:
            assert found["merged_off"] < 1e-5, f"{family} {method}: merged logits differ by {found['merged_off']}"


@pytest.mark.parametrize("method", ["lora", "dora", "lora+prompt+projector"])
def test_on_a_base_in_half_precision_an_adapter_stays_what_was_trained(bases, tmp_path, method):
    cell = train_cell(bases["qwen3_vl"], METHODS[method], tmp_path, dtype="bfloat16")
    assert reload_cell(cell)["reloaded"]


@pytest.mark.slow
def test_the_whole_product_and_the_support_table(bases, tmp_path):
    cells, verdicts = {}, {}
    for family, method, quantization in PRODUCT:
        key = (family, method, quantization)
        folder = tmp_path / family / f"{method}-{quantization}"
        folder.mkdir(parents=True)
        try:
            cells[key] = train_cell(bases[family], METHODS[method], folder, quantization=quantization)
        except FinetuneError as error:
            assert (family, method) in REFUSED or (method, quantization) in REFUSED, f"{key}: {error}"
            verdicts[key] = False
    found = reload_in_a_fresh_process(list(cells.values()), tmp_path)
    for key, result in zip(cells, found, strict=True):
        assert result["reloaded"], f"{key}: after reloading logits differ by {result['off']}"
        assert result.get("merged_off", 0) < 1e-5, f"{key}: merged logits differ by {result['merged_off']}"
        verdicts[key] = True
    assert support_table(verdicts) == read_table(), "run python -m tests.support to renew docs/support.md"

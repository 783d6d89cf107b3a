"""The pages that a new user walks through run as they stand there, on the pocket model and drawn rows."""

import json
import os
import re
import shutil

import pytest
from PIL import Image

from finetune.cli import main
from finetune.plugins import unregister
from tests.docs.test_faq import QUOTED, WALKED, is_quoted
from tests.docs_code import run_page, sections

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="the pages are written for bash"),
]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder in which docs/first-adapter.md was run, and the text that it printed."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("FINETUNE_REGISTRY", str(folder / "registry"))
        patch.chdir(folder)
        run_page("first-adapter.md")
    return folder


@pytest.fixture
def work(walked, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    folder = tmp_path / "work"
    shutil.copytree(walked, folder)
    monkeypatch.setenv("FINETUNE_REGISTRY", str(folder / "registry"))
    monkeypatch.chdir(folder)
    yield folder
    for group, name in (("metrics", "first_word"), ("families", "my_vlm")):
        unregister(group, name)


def test_the_first_adapter_learns(work):
    result = json.loads((work / "runs/mine/result.json").read_text())
    scores = {who: part["values"]["exact_match"]["value"] for who, part in result["metrics"].items()}
    assert result["ref"] == "retail/mine@1" and scores["test"] > scores["base"]


def test_evaluation(work, capsys):
    run_page("evaluation.md")
    shown = capsys.readouterr().out
    for column in ("exact match", "95 % interval", "majority", "blank image", "rows"):
        assert column in shown
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    assert {row["adapter"] for row in rows} == {"retail/mine"} and len(rows) == 40
    wrong = [row for row in rows if row["right"] is False]
    assert shown.count("['Which") + shown.count("] Which") + shown.count("] What") == len(wrong)


def test_runs(work, capsys):
    files = "".join(sections("runs.md")["What lies in a run's folder"].splitlines(keepends=True))
    named = {
        name.rstrip("/")
        for row in re.findall(r"^\| (`.*?) \|", files, re.MULTILINE)
        for name in re.findall(r"`(.+?)`", row)
    }
    there = {path.name for path in (work / "runs/mine").iterdir()} - {".lock"}
    run_page("runs.md")
    assert there == named - {"trackers", "previous/1"}
    assert (work / "runs/mine/previous/1/result.json").is_file() and (work / "runs/mine-sweep/sweep.json").is_file()
    shown = capsys.readouterr().out
    assert "suggested: train.learning_rate=" in shown or "no suggestion" in shown
    assert "train.epochs" in shown


def test_how_do_i(work, capsys):
    (work / "scans" / "img").mkdir(parents=True)
    Image.new("RGB", (900, 600)).save(work / "scans" / "img" / "1.png")
    scans = [{"image": "img/1.png", "question": "?", "answer": "x", "patient": number // 3} for number in range(60)]
    (work / "scans" / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scans))
    run_page("how-do-i.md")
    splits = {
        name: [json.loads(line)["patient"] for line in (work / "scans" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "val", "test")
    }
    assert {name: len(set(of)) for name, of in splits.items()} == {"train": 16, "val": 2, "test": 2}
    assert sum(map(len, splits.values())) == len(scans)
    with Image.open(work / "scans" / "img-small" / "1.png") as image:
        assert image.size == (448, 299)
    manifest = json.loads((work / "runs/mine-again/adapter/manifest.json").read_text())
    assert manifest["parents"][0].startswith("retail/mine@sha256:")
    assert "first_word" in json.loads((work / "runs/mine-first-word/result.json").read_text())["metric"]


def test_loading_and_export(work, capsys):
    run_page("loading.md")
    run_page("export.md")
    assert "done" in capsys.readouterr().out
    assert (work / "exports/retail-mine-merged/export.json").is_file()


def test_errors_after_a_run(work, capsys, tiny_idefics3):
    rows = (work / "shop/train.jsonl").read_text()
    (work / "shop/marked.jsonl").write_text(rows.replace('"answer": "', '"answer": "<|end|>'))
    unfinished = ["train", "mine.yaml", "name=stopped", "adapter.publish=null", "train.epochs=1"]
    assert main(unfinished) == 0
    (work / "runs/stopped/result.json").unlink()  # as a run that was killed leaves it
    shutil.rmtree(work / "runs/stopped/adapter")
    commands = [
        ["train", "mine.yaml"],
        [*unfinished, "train.learning_rate=1e-4"],
        ["ask", "retail/mine", "shop/img/test-0.png", "?", "--base", str(tiny_idefics3)],
        ["export", "retail/mine", "--to", "vllm", "--base", "pocket"],
        ["registry", "promote", "retail/mine", "prod", "--require", "test.exact_match>1"],
        ["train", "mine.yaml", "name=long", "data.max_length=8"],
        ["train", "mine.yaml", "name=marked", "data.train=marked.jsonl"],
    ]
    capsys.readouterr()
    messages = []
    for words in commands:
        assert main(words) in (1, 2)
        messages.append("".join(capsys.readouterr()))
    for quoted in WALKED & {*QUOTED}:
        assert any(is_quoted(quoted, message) for message in messages), (quoted, messages)
    assert WALKED <= {*QUOTED}

"""Text from outside: what is made of it, and that every exit of a run, of a command and of a page makes it harmless."""

import io
import json
import logging
from types import SimpleNamespace

import pytest
from PIL import Image

from finetune import cli
from finetune.core.outside_text import (
    LogFormatter,
    for_stream,
    html_text,
    markdown,
    markdown_block,
    markdown_cell,
    markdown_code,
    safe_block,
    safe_line,
)
from finetune.errors import DataError
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.report import Sample, write_page
from finetune.evaluation.scores import Scores
from finetune.launch.processes import exit_code_of_process
from finetune.runs.train import train
from tests.hostile_text import HOSTILE, harms_in
from tests.scores import scores_json

HALF = HOSTILE + "\ud800"
WORD = "\x1b[2J\u202e<i>"


def test_a_line_and_a_block():
    assert safe_line("a\x1b[2J\tb\nc\r\u202e\u2028\x9b\x7f\ud800") == r"a\x1b[2J\tb\nc\r\u202e\u2028\x9b\x7f\ud800"
    assert safe_block("a\x1b\n\tb\r\n") == "a\\x1b\n\tb\\r\n"
    for text in ("plain", "日本語　です", "می‌خواهم", "👩‍👩‍👧", "naïve – “x”"):
        assert safe_line(text) == safe_block(text) == text
    assert safe_line("x" * 20, 10) == "xxxxxxx..." and len(safe_line("\x1b" * 20, 10)) == 10
    assert harms_in(safe_line(HALF) + safe_block(HALF) + html_text(HALF)) == []


def test_markdown():
    assert markdown("Clinic Research 2 (non-commercial), exact_match: 0.5") == (
        "Clinic Research 2 (non-commercial), exact_match: 0.5"
    )
    assert markdown("<b>\n# x") == "`<b> # x`" and markdown("see www.x.org") == "`see www.x.org`"
    assert markdown_code("a ``b`` c`") == "``` a ``b`` c` ```"
    assert markdown_cell("a|b") == "`a\\|b`" and markdown_cell("a\\b") == "`a\\b`"
    assert markdown_cell("a\\|<img src=x>") == "`a\uff3c\\|<img src=x>`"
    assert markdown_block("x = '````'\x1b", "python") == "`````python\nx = '````'\\x1b\n`````"


@pytest.mark.parametrize("text", ["a\\|<b>", "a\\\\|<b>", "|<b>|", "\\|`|<b>"])
def test_nothing_leaves_a_cell_of_a_table(text):
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(f"| a | b |\n|---|---|\n| {markdown_cell(text)} | end |\n")
    cells = [token.children for token in tokens if token.type == "inline"][2:]
    assert [[child.type for child in cell] for cell in cells] == [["code_inline"], ["text"]]
    assert cells[1][0].content == "end"


def test_answers_are_exact_where_no_terminal_reads_them():
    stream = io.StringIO()
    assert for_stream(HALF, stream) == HALF
    stream.isatty = lambda: True
    assert harms_in(for_stream(HALF, stream)) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_ask(monkeypatch, capsys, tmp_path, terminal):
    answer = SimpleNamespace(text=HOSTILE, finish_reason="stop")
    model = SimpleNamespace(answer=lambda image, question: answer)
    monkeypatch.setattr("finetune.serving.loading.load", lambda ref, **options: model)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert cli.main(["ask", "base", str(tmp_path / "a.png"), "What?", "--base", "pocket"]) == 0
    out = capsys.readouterr().out
    assert harms_in(out) == [] if terminal else out == HOSTILE + "\n"


def test_an_error_of_a_command_and_of_a_process(monkeypatch, capsys):
    def refuse(args=None):
        raise DataError(f"row {HALF}")

    monkeypatch.setattr(cli, "_train", refuse)
    assert cli.main(["train", "a.yaml"]) == 2
    assert exit_code_of_process(refuse) == 2
    err = capsys.readouterr().err
    assert err.count("row ") == 2 and r"\x1b]0;title" in err and harms_in(err) == []


def test_a_traceback_that_a_process_leaves(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_FAILURES", str(tmp_path))

    def fail():
        raise ValueError(HALF)

    assert exit_code_of_process(fail) == 1
    left = json.loads((tmp_path / "0.json").read_text())["traceback"]
    assert "ValueError" in left and harms_in(left) == []


def test_the_log_of_a_server():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter())
    try:
        raise ValueError(f"{HALF}\nsecond line")
    except ValueError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "", 0, "it failed: %s", (str(error),), (type(error), error, None)
        )
    handler.handle(record)
    written = stream.getvalue()
    assert harms_in(written) == [] and r"\nsecond line" in written.split("\n")[0]


def test_the_server_logs_so(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("logging.basicConfig", lambda handlers: given.extend(handlers))
    assert cli.main(["serve", "a/b", "--base", str(tmp_path / "none")]) == 2
    assert [type(handler.formatter) for handler in given] == [LogFormatter]


def test_a_page(tmp_path):
    sample = Sample(image=Image.new("RGB", (4, 4)), question=HALF, reference=HALF, predictions={HALF: (HALF, True)})
    scores = Scores.from_json(scores_json(0.5, metric=HALF, question_types={HALF: 0.5}))
    one = Evaluation(adapter=HALF, config=HALF, scores=scores, rows=())
    page = {"title": HALF, "intro": HALF, "own": {}, "samples": {HALF: [sample]}, "footer": HALF}
    write_page(tmp_path / "a.html", evaluations=[one], **page)
    written = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert harms_in(written) == [] and "</script>" not in written and "<b " not in written


def test_a_run(make_recipe, rows_folder, tiny_fast_vlm, capsys):
    """Hostile rows, some of which are left out, and a hostile recipe."""
    for split in ("train", "val", "test"):
        path = rows_folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row |= {"question": HOSTILE, "answer": f"{WORD} {row['answer']}", "question_type": HOSTILE}
            row[f"unread {HOSTILE}"] = HOSTILE
        copies = 2 if split == "train" else 1
        bad = [rows[0] | {"image": f"no {HOSTILE}.png"}] if split == "train" else []
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows * copies, *bad]))
    recipe = make_recipe(
        tiny_fast_vlm,
        data={"on_error": "skip"},
        train={"max_steps": 1},
        adapter={"license": HOSTILE, "intended_use": HOSTILE},
    )
    train(recipe)
    shown, err = capsys.readouterr()
    samples = (recipe.run_folder / "samples.txt").read_text(encoding="utf-8")
    page = (recipe.run_folder / "samples.html").read_text(encoding="utf-8")
    assert harms_in(shown) == []
    assert harms_in(err.replace("\r", "").replace("\x1b[A", "")) == []  # the progress bar's own
    assert "skipped 1 of" in shown and "not read" in shown
    assert r"\x1b]0;title" in samples and samples.count("\n") == 3 and harms_in(samples) == []
    assert r"\x1b]0;title" in page and harms_in(page) == [] and "</script>" not in page
    lines = (recipe.run_folder / "predictions-base.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    answers = [json.loads(line)["references"] for line in lines]
    assert all(one[0].startswith(WORD) for one in answers)

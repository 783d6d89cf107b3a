"""The command: help that answers at once, exit codes, and errors that are one line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune import cli, errors
from finetune.cli import main

VERBS = [
    [],
    *([verb] for verb in ("demo", "train", "sweep", "find-lr", "ask", "app", "schema", "registry")),
    *(
        ["registry", verb]
        for verb in ("publish", "resolve", "pull", "list", "log", "alias", "rollback", "yank", "verify")
    ),
    *(["registry", verb] for verb in ("diff", "promote", "push", "fetch", "export-archive", "import-archive")),
    *(["registry", verb] for verb in ("mirror", "fetch-oci")),
]


def all_errors(tree=errors.FinetuneError):
    return [tree, *(error for branch in tree.__subclasses__() for error in all_errors(branch))]


def test_every_help_is_there_and_loads_nothing_heavy():
    """In one process: whatever one of them loaded would still be there at the end."""
    code = """
import contextlib, io, json, sys
from finetune.cli import main
outputs = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    outputs.append(out.getvalue())
heavy = {"torch", "transformers", "peft", "datasets", "accelerate", "numpy", "PIL", "huggingface_hub", "httpx2"}
heavy &= set(sys.modules)
print(json.dumps([outputs, sorted(heavy)]))
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(VERBS)], capture_output=True, text=True, check=True)
    outputs, heavy = json.loads(done.stdout)
    assert heavy == []
    for words, text in zip(VERBS, outputs, strict=True):
        assert text.startswith(" ".join(["usage: finetune", *words])), words
    verbs = {words[0] for words in VERBS[1:]}
    assert all(f"\n    {verb} " in outputs[0] for verb in verbs)
    assert "exit codes:\n  0      done\n  1      the command ran, and the answer is no" in outputs[0]


@pytest.mark.parametrize(
    "error", [e for e in all_errors() if e is not errors.StoppedError], ids=lambda error: error.__name__
)
def test_every_error_of_ours_is_one_line_and_exit_code_2(error, monkeypatch, capsys):
    def refuse(args):
        raise error("a.yaml: train.seed: no such key. Did you mean 'seed'?")

    monkeypatch.setattr(cli, "_train", refuse)
    assert main(["train", "a.yaml"]) == 2
    assert capsys.readouterr() == ("", "error: a.yaml: train.seed: no such key. Did you mean 'seed'?\n")


def test_the_error_of_a_stopped_run_names_the_signal(monkeypatch, capsys):
    def stop(args):
        raise errors.StoppedError("stopped after step 3", signum=15)

    monkeypatch.setattr(cli, "_train", stop)
    assert main(["train", "a.yaml"]) == 143
    assert capsys.readouterr() == ("", "stopped after step 3\n")


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    def fail(args):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", "a.yaml"])


def test_a_stop_by_the_keyboard_is_reported(monkeypatch):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_train", stop)
    assert main(["train", "a.yaml"]) == 130


@pytest.mark.parametrize("words", [[], ["tarin"], ["train"], ["registry"], ["train", "a.yaml", "--fast"]])
def test_wrong_usage_is_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: finetune")


def test_commands_pass_on_what_they_are_given(monkeypatch):
    from finetune.runs import sweep

    given = []
    monkeypatch.setattr(sweep, "run_sweep", lambda config, words: given.append((str(config), words)) or 7)
    assert main(["sweep", "a.yaml", "seed=1,2", "train.epochs=3"]) == 7
    assert given == [("a.yaml", ["seed=1,2", "train.epochs=3"])]


def test_ask_takes_a_registry_and_errors_name_its_own_option(tmp_path, capsys):
    assert main(["ask", "retail/mine", "a.png", "What?", "--base", "pocket", "--registry", str(tmp_path / "none")]) == 2
    assert f"there is no registry at {tmp_path / 'none'}" in capsys.readouterr().err
    assert main(["ask", "base", "a.png", "What?"]) == 2
    assert "(--base)" in capsys.readouterr().err


def test_ask_and_app_hold_the_base_as_given(monkeypatch, capsys):
    given = []

    answer = SimpleNamespace(text="yes", finish_reason="stop")
    model = SimpleNamespace(answer=lambda image, question: answer)
    monkeypatch.setattr("finetune.serving.loading.load", lambda ref, **options: given.append(options) or model)
    monkeypatch.setattr("finetune.playground.running.run_app", lambda refs, **options: given.append(options) or 0)
    how = ["--base", "pocket", "--device", "cpu", "--dtype", "bfloat16", "--quantization", "4bit"]
    image = Path(__file__).parents[1] / "docs" / "app.png"
    assert main(["ask", "base", str(image), "What?", *how]) == 0 and capsys.readouterr().out == "yes\n"
    assert main(["app", "base", *how]) == 0
    for options in given:
        held = {name: options[name] for name in ("device", "dtype", "quantization")}
        assert held == {"device": "cpu", "dtype": "bfloat16", "quantization": "4bit"}


def test_the_error_of_the_one_question_names_no_row(tmp_path, capsys):
    (tmp_path / "half.png").write_bytes((Path(__file__).parents[1] / "docs" / "app.png").read_bytes()[:3000])
    assert main(["ask", "base", str(tmp_path / "half.png"), "What?", "--base", "pocket"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'half.png'}: not a readable")


@pytest.mark.parametrize(
    ("reason", "note"), [("length", "note: the answer stops at the limit of 16 tokens\n"), ("stop", "")]
)
def test_ask_reports_that_an_answer_was_cut(monkeypatch, capsys, tmp_path, reason, note):
    from PIL import Image

    from finetune.serving import loading
    from finetune.tasks.generation import Answer

    found = Answer(text="a red hat and", finish_reason=reason, prompt_tokens=9, completion_tokens=16)
    monkeypatch.setattr(loading, "load", lambda *args, **kw: SimpleNamespace(answer=lambda image, question: found))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert main(["ask", "base", str(tmp_path / "a.png"), "What?", "--base", "pocket"]) == 0
    assert capsys.readouterr() == ("a red hat and\n", note)

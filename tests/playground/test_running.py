"""``finetune app``: what cannot be done is one line, before anything is loaded where that is possible."""

import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest

from finetune import cli
from finetune.cli import main
from finetune.launch.listening import listening


def test_the_command_passes_on_what_it_is_given(monkeypatch):
    from finetune.playground import running

    given = []
    monkeypatch.setattr(running, "run_app", lambda refs, **options: given.append((refs, options)) or 143)
    assert main(["app", "a/b", "c/d@2", "--base", "pocket", "--registry", "R", "--port", "1"]) == 143
    assert main(["app"]) == 143
    held = {"device": "auto", "dtype": "float32", "quantization": None}
    assert given == [
        (["a/b", "c/d@2"], {"base": "pocket", "registry": "R", "host": "127.0.0.1", "port": 1, **held}),
        ([], {"base": None, "registry": None, "host": "127.0.0.1", "port": 7860, **held}),
    ]


def test_no_base_is_refused_at_once(capsys):
    assert main(["app"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: finetune app needs a base or an adapter, got neither. Add --base (such as --base pocket)"
    )


def test_a_missing_gradio_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("finetune.core.extras.find_spec", lambda name: None)
    assert main(["app", "--base", "pocket"]) == 2
    assert capsys.readouterr().err == (
        f"error: finetune app needs gradio, not installed for {sys.executable}. Run: pip install 'finetune-vlm[app]'\n"
    )


def test_a_port_in_use_is_refused_before_the_base_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("finetune.playground.running._load", lambda *given: pytest.fail("the base was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--base", "pocket", "--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot listen on 127.0.0.1, port {port}: ")
    assert main(["app", "--base", "pocket", "--port", "70000"]) == 2
    assert capsys.readouterr().err == "error: --port must be a number from 0 to 65535, got 70000\n"


def test_the_address_is_printed_once_the_page_can_be_opened(monkeypatch):
    from starlette.responses import PlainTextResponse

    from finetune.playground import running

    def opened(text, **options):
        with socket.create_connection(text, timeout=10):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(running, "print", opened, raising=False)
    with listening("127.0.0.1", 0) as listener:
        code = running._serve(PlainTextResponse("the page"), listener, listener.getsockname())
    assert code == 128 + signal.SIGTERM


def test_a_reference_that_stands_for_nothing(capsys):
    assert main(["app", "medical/nothing", "--base", "pocket", "--port", "0"]) == 2
    out, err = capsys.readouterr()
    assert "error: " in err and "medical/nothing" in err and "Traceback" not in err
    assert out == ""


def test_the_commands_of_docs_are_commands(monkeypatch):
    """Those of the page itself also run, before a browser."""
    ran = []
    for verb in ("_demo", "_app"):
        monkeypatch.setattr(cli, verb, lambda args, verb=verb: ran.append(verb) or 0)
    page = (Path(cli.__file__).parents[1] / "docs" / "app.md").read_text(encoding="utf-8")
    for command in re.findall(r"^finetune (.*)$", page, re.MULTILINE):
        assert main(command.split()) == 0
    assert ran == ["_demo", "_app", "_app"]
    for named in re.findall(r"\]\((\S+)\)", page):
        assert (Path(cli.__file__).parents[1] / "docs" / named).is_file()


@pytest.mark.parametrize(
    ("host", "for_all", "status"),
    [("localhost:7860", False, 200), ("evil.example", False, 403), ("gpu-box.example", True, 200)],
)
def test_a_page_of_this_machine_is_shown_under_its_names_alone(host, for_all, status):
    from starlette.responses import PlainTextResponse
    from starlette.testclient import TestClient

    from finetune.playground.running import _HostCheck

    app = _HostCheck(PlainTextResponse("the page"), for_all=for_all)
    answer = TestClient(app).get("/", headers={"Host": host})
    assert answer.status_code == status and "content-security-policy" in answer.headers or status == 403

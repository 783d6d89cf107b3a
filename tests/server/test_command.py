"""The command as people start it: what it says, what it refuses at once, how it stops; and the commands of its page."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from finetune.cli import main
from tests.server.conftest import REFS
from tests.server.serving import body, http_client, png, wait_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "needs an adapter or --base, got neither"),
        (["base"], "needs an adapter or --base, got neither"),
        (["nothing"], "'nothing' is not an adapter reference"),
        (["/tmp", "--base", "pocket"], "is not an adapter reference"),
        (["--base", "pocket", "--host", "0.0.0.0"], "needs API keys, and none is set (--host 0.0.0.0)"),
        (
            ["--base", "pocket", "--host", "nowhere.invalid"],
            "--host must be an address of this machine, got nowhere.invalid",
        ),
        (["--base", "pocket", "--api-key-file", "/nowhere"], "cannot be read"),
    ],
    ids=["nothing", "which base", "no reference", "folder", "open to all", "host", "keys"],
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("FINETUNE_API_KEYS", raising=False)
    monkeypatch.setattr("finetune.assemble.loading.load_base", None)
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_base_may_be_named_as_everywhere_else(tiny_fast_vlm, monkeypatch):
    served = []
    monkeypatch.setattr("finetune.server.run.serve", lambda vlm, refs, *more, **named: served.append(refs) or 0)
    assert main(["serve", "base", "--base", str(tiny_fast_vlm), "--port", "0"]) == 0 and served == [[]]


def test_a_port_that_is_taken_is_named(capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--base", "pocket", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--port=70000", "--max-batch=0", "--queue-seconds=0", "--stop-seconds=inf"])
def test_a_bound_that_is_none_is_refused(argument, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--base", "pocket", argument])
    assert caught.value.code == 2 and argument.partition("=")[0] in capsys.readouterr().err


def test_the_error_of_a_missing_package_names_the_install_command(monkeypatch, capsys):
    monkeypatch.setattr("finetune.core.extras.find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve", "--base", "pocket"]) == 2
    error = capsys.readouterr().err
    assert f"needs uvicorn, not installed for {sys.executable}. Run: pip install 'finetune-vlm[serve]'" in error


def test_a_base_that_writes_no_text_is_refused(tiny_clip, capsys):
    assert main(["serve", "--base", str(tiny_clip), "--port", "0"]) == 2
    err = capsys.readouterr().err
    assert f"must be generative, got dual_encoder ({tiny_clip}). Choose a base that generates text." in err


@contextlib.contextmanager
def command(base_folder, registry_folder, *more):
    """Yield the real command, its address and what it said, once it listens."""
    arguments = ["serve", *REFS, "--base", str(base_folder), "--registry", str(registry_folder), "--port", "0", *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune.cli", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background, otherwise
    )
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        yield process, re.search(r"http://[\d.:]+", lines[0])[0], lines
    finally:
        process.kill()
        process.communicate()


@pytest.mark.distributed
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_what_runs_end_and_takes_nothing_more(base_folder, registry_folder, signum):
    with command(base_folder, registry_folder, "--max-batch", "1") as (process, url, lines), http_client() as client:
        assert lines[0].startswith("serving on http://127.0.0.1:") and str(base_folder) in lines[1]
        assert all(ref in lines[2] for ref in REFS) and re.search(
            r"no API key needed; ready after [1-9]\d*\.\d s", lines[3]
        )
        found = []

        def ask():
            request = body(REFS[0], stream=True, max_tokens=200)
            with client.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=60) as response:
                found.append("")
                for text in response.iter_text():
                    found[0] += text

        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: found and '"content"' in found[0], 60)
        process.send_signal(signum)
        wait_for(lambda: not _answers(url), 30)
        asking.join(60)
        assert found[0].rstrip().endswith("data: [DONE]")
        assert process.wait(30) == 128 + signum
        assert process.stderr.read().rstrip().endswith("stopped")


def _answers(url):
    try:
        return bool(httpx.get(f"{url}/health", timeout=5, trust_env=False))
    except httpx.TransportError:
        return False


@pytest.mark.distributed
@pytest.mark.skipif(os.name == "nt", reason="the page is written for bash")
def test_the_commands_of_the_page(tmp_path):
    from finetune.assemble.loading import load_base
    from finetune.registry import AdapterRegistry
    from tests.server.test_catalog import rename
    from tests.serving.adapters import make_adapter

    base, registry = load_base("pocket", device="cpu"), AdapterRegistry()
    for seed, name in enumerate(("medical/phantoms", "retail/products")):
        folder = make_adapter(base, "lora", tmp_path / "adapters" / str(seed), seed=seed)
        rename(folder, *name.split("/"))
        registry.publish(folder, aliases=["prod"])
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "bash", "python", "bash"]
    (tmp_path / "scan.png").write_bytes(png())
    lines = [text if language == "bash" else f'python - <<"END"\n{text}END\necho\n' for language, text in blocks]
    with contextlib.closing(__import__("socket").create_server(("127.0.0.1", 0))) as free:
        port = str(free.getsockname()[1])
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, command_line in (("finetune", "-m finetune.cli"), ("python", "")):
        (bin / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command_line} "$@"\n')
        (bin / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-meuo", "pipefail", "-c", "\n".join(lines).replace("8000", port)],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"object":"chat.completion"' in done.stdout and "retail/products@latest" in done.stdout
    assert 'finetune_requests_total{adapter="medical/phantoms@prod",status="200"} 2.0' in done.stdout
    assert 'finetune_requests_total{adapter="retail/products@prod",status="200"} 1.0' in done.stdout
    assert "ended with 143" in done.stdout

"""The page on apps and its examples run as they stand there, on the pocket model with two adapters."""

import importlib.util
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from finetune.assemble.loading import load_base
from finetune.pocket.medical import draw_phantom
from finetune.pocket.retail import draw_product
from finetune.registry import AdapterRegistry
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.serving.adapters import make_adapter

DOCS = Path(__file__).parents[2] / "docs"
REFS = ["retail/products@prod", "medical/phantoms@prod"]
QUESTIONS = ["What color is it?", "Is there a lesion?"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two adapters of the pocket model, and an image for each."""
    folder = tmp_path_factory.mktemp("made")
    base = load_base("pocket", device="cpu")
    for number, draw in enumerate((draw_product, draw_phantom)):
        domain, name = REFS[number].removesuffix("@prod").split("/")
        make_adapter(base, "lora", folder / str(number), seed=number, name=name, domain=domain)
        Image.fromarray(draw(0, "test", 0).image).save(folder / ("product.png", "scan.png")[number])
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A folder with the images, beside a registry with the adapters."""
    registry = AdapterRegistry()
    for number, ref in enumerate(REFS):
        registry.publish(made / str(number), ref.removesuffix("@prod"), aliases=["prod"])
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("product.png", "scan.png"):
        (folder / name).write_bytes((made / name).read_bytes())
    monkeypatch.chdir(folder)
    return folder


def example(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers_one_by_one():
    vlm = VisionLanguageModel(load_base("pocket", device="cpu"), registry=AdapterRegistry())
    found = []
    for ref, image, question in zip(REFS, ("product.png", "scan.png"), QUESTIONS, strict=True):
        with vlm.using(ref):
            found.append(vlm.ask(image, question))
    return found


def test_the_page(work, capsys):
    page = (DOCS / "apps.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    exec(compile("\n".join(blocks), "apps.md", "exec"), {})
    output = capsys.readouterr().out
    product, scan = answers_one_by_one()
    assert product != scan
    assert output.startswith(f"{product}\n{scan}\n{[product, scan]}\n") and output.endswith(f"{[product, scan]}\n")
    assert output.count(product) >= 4 and "every address of the host must be public" in output


def test_what_the_page_names_exists():
    import finetune.errors

    page = (DOCS / "apps.md").read_text(encoding="utf-8")
    assert all((DOCS / path).exists() for path in re.findall(r"\]\(([\w/.]+)\)", page))
    assert all(hasattr(finetune.errors, name) for name in re.findall(r"`(\w+Error)`", page))


def test_the_service(work, monkeypatch):
    from starlette.testclient import TestClient

    monkeypatch.setenv("APP_BASE", "pocket")
    monkeypatch.setenv("APP_ADAPTERS", ",".join(REFS))
    service = example("fastapi_app")
    wanted = answers_one_by_one()
    with TestClient(service.app) as client:
        for ref, name, question, answer in zip(REFS, ("product.png", "scan.png"), QUESTIONS, wanted, strict=True):
            asked = {"params": {"question": question, "adapter": ref}, "content": (work / name).read_bytes()}
            assert client.post("/ask", **asked).json() == {"answer": answer}
            assert client.post("/stream", **asked).text == answer
        for ref in ("medical/nobody", str(work), "../work"):
            found = client.post("/ask", params={"question": "?", "adapter": ref}, content=b"")
            assert found.status_code == 404 and f"there are {', '.join(REFS)}" in found.json()["detail"]
        found = client.post("/ask", params={"question": "?"}, content=b"<html>")
        assert found.status_code == 400 and "its image: not a readable image" in found.json()["detail"]
        assert client.post("/ask", params={"question": "?"}, content=bytes(10_485_761)).status_code == 413
        assert client.post("/ask", content=b"").status_code == 422


def test_a_client_that_goes_ends_its_answer(work, monkeypatch):
    import uvicorn

    monkeypatch.setenv("APP_BASE", "pocket")
    monkeypatch.setenv("APP_ADAPTERS", ",".join(REFS))
    service = example("fastapi_app")
    server = uvicorn.Server(uvicorn.Config(service.app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        vlm, steps = service.app.state.vlm, []
        generate = vlm.model.generate

        def generate_slowly(stopping_criteria, **inputs):
            def wait(ids, scores):
                steps.append(ids)
                time.sleep(0.02)
                return torch.zeros(len(ids), dtype=torch.bool)

            return generate(stopping_criteria=[wait, *stopping_criteria], min_new_tokens=400, **inputs)

        monkeypatch.setattr(vlm.model, "generate", generate_slowly, raising=False)
        monkeypatch.setitem(vars(vlm.add(REFS[0]).manifest.task), "max_new_tokens", 400)
        with socket.create_connection(server.servers[0].sockets[0].getsockname()) as client:
            body = (work / "product.png").read_bytes()
            head = f"POST /stream?question=What&adapter={REFS[0]} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            client.sendall(f"{head}\r\n\r\n".encode() + body)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 OK")
            wait_until(lambda: len(steps) > 2)
        wait_until(lambda: not [one for one in threading.enumerate() if one.name == "finetune-stream"])
        assert len(steps) < 400
    finally:
        server.should_exit = True
        thread.join(60)


def wait_until(happened):
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def write_questions(work, count=6):
    """Write rows that can be answered, and four that cannot."""
    images = [(work / name).read_bytes() for name in ("product.png", "scan.png")]
    rows = [
        {
            "id": n,
            "image": {"bytes": images[n % 2], "path": None},
            "question": QUESTIONS[n % 2],
            "adapter": REFS[n % 2],
        }
        for n in range(count)
    ]
    rows += [
        {**rows[0], "id": "bad", "image": {"bytes": b"<html>", "path": None}},
        {**rows[0], "id": "missing", "image": {"bytes": None, "path": "no.png"}},
        {**rows[0], "id": "nobody", "adapter": "medical/nobody"},
        {**rows[1], "id": "by path", "image": {"bytes": None, "path": "scan.png"}},
        {**rows[0], "id": "plain", "adapter": None},
        {**rows[0], "id": "mute", "question": None},
    ]
    pq.write_table(pa.Table.from_pylist([row | {"id": str(row["id"])} for row in rows]), work / "questions.parquet")
    return len(rows)


def job(*arguments):
    script = DOCS / "examples" / "batch_job.py"
    return [sys.executable, str(script), *arguments, "--base", "pocket", "--batch-size", "3"]


def run_job(monkeypatch, *arguments):
    """Run the job in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", job(*arguments)[1:])
    return example("batch_job").main()


def test_the_batch_job(work, monkeypatch, capsys):
    count = write_questions(work)
    assert run_job(monkeypatch, "questions.parquet", "answers.parquet") == 0
    shown = capsys.readouterr()
    assert shown.out == "answers.parquet: 12 rows, 4 of them with an error\n"
    assert "12/12" in shown.err and "errors=4" in shown.err
    table = pq.read_table("answers.parquet")
    assert table.column_names == ["id", "question", "adapter", "answer", "error"] and len(table) == count
    rows = {row["id"]: row for row in table.to_pylist()}
    product, scan = answers_one_by_one()
    assert [rows[str(n)]["answer"] for n in range(6)] == [product, scan] * 3
    assert rows["by path"]["answer"] == scan and rows["plain"]["answer"]
    errors = {name: row["error"] for name, row in rows.items() if row["error"] is not None}
    assert errors.keys() == {"bad", "missing", "nobody", "mute"}
    assert all(rows[name]["answer"] is None for name in errors)
    assert "not a readable image: its format must be one of AVIF, BMP" in errors["bad"]
    assert "no.png: no such file" in errors["missing"]
    assert "medical/nobody" in errors["nobody"] and "a question must be a str, got None" in errors["mute"]
    assert sorted(path.name for path in work.iterdir() if "answers" in path.name) == ["answers.parquet"]


def test_a_job_that_was_stopped_goes_on(work, monkeypatch, capsys):
    write_questions(work)
    module = example("batch_job")
    answered, calls = module.answered, []

    def stop_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answered(*args)

    monkeypatch.setattr(module, "answered", stop_at_the_third)
    monkeypatch.setattr(sys, "argv", job("questions.parquet", "answers.parquet")[1:])
    assert module.main() == 130 and "stopped; the same command resumes the job" in capsys.readouterr().err
    assert not (work / "answers.parquet").exists()
    monkeypatch.setattr(sys, "argv", [*job("questions.parquet", "answers.parquet")[1:], "--batch-size", "4"])
    assert module.main() == 2
    assert "holds answers of a job with another batch_size. Remove it, or write to" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", job("questions.parquet", "answers.parquet")[1:])
    assert module.main() == 0 and len(calls) == 3 + 2
    run_job(monkeypatch, "questions.parquet", "again.parquet")
    assert pq.read_table("answers.parquet").to_pylist() == pq.read_table("again.parquet").to_pylist()


def test_a_file_that_is_none(work, monkeypatch, capsys):
    assert run_job(monkeypatch, "no.parquet", "answers.parquet") == 2
    assert "no.parquet" in capsys.readouterr().err
    assert run_job(monkeypatch, "scan.png", "answers.parquet") == 2
    pq.write_table(pa.table({"photo": [b""], "question": ["?"]}), "wrong.parquet")
    assert run_job(monkeypatch, "wrong.parquet", "answers.parquet") == 2
    assert "the columns must be image and question, " in capsys.readouterr().err


@pytest.mark.distributed
def test_a_job_that_was_killed_goes_on(work):
    write_questions(work, count=60)
    command = job("questions.parquet", "answers.parquet")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        parts = work / "answers.parquet.parts"
        until = time.monotonic() + 120
        while len(list(parts.glob("*.parquet"))) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert parts.exists() and not (work / "answers.parquet").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "66 rows, 4 of them with an error" in done.stdout
    assert len(pq.read_table("answers.parquet")) == 66 and not parts.exists()

"""``docs/extend.md`` is the walk of a package from outside; here it is built, installed beside this one, and walked."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from tests.docs_code import block, blocks

ROOT = Path(__file__).parents[2]
PAGE = "extend.md"
FILES = (
    "pyproject.toml", "finetune_count.py", "finetune_count_loss.py", "finetune_count_family.py", "finetune_grade.py",
    "finetune_grade_batches.py",
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="the page is written for bash"),
]


def run(words, cwd, env, **options):
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with base, rows and recipe, and the environment in which the package is installed."""
    folder = tmp_path_factory.mktemp("extend")
    package, installed = folder / "package", folder / "installed"
    package.mkdir()
    for name in FILES:
        (package / name).write_text(block(PAGE, name), encoding="utf-8")
    env = {
        **os.environ,
        "FINETUNE_CACHE": str(folder / "cache"),
        "FINETUNE_REGISTRY": str(folder / "registry"),
        "HOME": str(folder / "home"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    pip = [sys.executable, "-m", "pip", "--quiet"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), "."], package, env)
    (wheel,) = folder.glob("finetune_count-*.whl")
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel)], folder, env)
    work = folder / "work"
    _base(work / "counter-base")
    _rows(work / "rows")
    for name in ("count.yaml", "grade.yaml"):
        (work / name).write_text(block(PAGE, name), encoding="utf-8")
    # A read-only copy of this package: nothing of it may change for a plug-in.
    own = folder / "finetune-only"
    shutil.copytree(ROOT / "finetune", own / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    for path in own.rglob("*"):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    command = folder / "bin" / "finetune"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m finetune.cli "$@"\n')
    command.chmod(0o755)
    env |= {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
    without = env | {"PYTHONPATH": str(own)}
    yield work, without | {"PYTHONPATH": f"{installed}{os.pathsep}{own}"}, without
    for path in own.rglob("*"):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def _base(folder):
    from tests.tiny import FAMILIES

    FAMILIES["smolvlm"](folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "counter", "architectures": ["CounterModel"]}
    (folder / "config.json").write_text(json.dumps(config))


def _rows(folder):
    folder.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(folder / f"image-{i}.png")
    for split, number in (("train", 12), ("val", 4), ("test", 4)):
        rows = [
            {"image": f"image-{i % 4}.png", "question": "How many cells?", "answer": str(i % 4)} for i in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def walked(place):
    work, env, without = place
    return run(["bash", "-euo", "pipefail", "-c", "".join(blocks(PAGE, "bash"))], work, env), work, env, without


def test_it_trains_goes_on_evaluates_publishes_and_passes_its_gate(walked):
    done, work, _, _ = walked
    output = done.stdout
    assert "val.mean_absolute_error" in (work / "runs" / "count" / "log.jsonl").read_text()
    logged = [json.loads(line) for line in (work / "runs" / "count" / "log.jsonl").read_text().splitlines()]
    losses = next(line for line in logged if "loss" in line)
    assert {"cross_entropy.answer", "smoothed.smoothed"} <= losses.keys()
    assert losses["loss"] == pytest.approx(losses["cross_entropy.answer"] + 0.5 * losses["smoothed.smoothed"], abs=1e-4)
    assert "going on from" in output and "published cells/count@2" in output
    manifest = json.loads((work / "runs" / "count" / "adapter" / "manifest.json").read_text())
    assert manifest["task"]["unit"] == "cells" and manifest["training"]["steps"] in (2, 4, 6)
    value = manifest["metrics"]["test"]["values"]["mean_absolute_error"]
    assert (value["unit"], value["higher_is_better"], value["n"]) == ("cells", False, 4)
    # References are 0, 1, 2 and 3, so always saying their median is off by 1.5, .5, .5 and 1.5.
    assert manifest["metrics"]["test"]["baselines"]["majority"]["mean_absolute_error"]["value"] == 1.0
    table = json.loads((work / "table.json").read_text())["rows"]
    assert table[1]["scores"]["values"]["mean_absolute_error"] == value
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    assert {row["prediction"]["type"] for row in rows} == {"number"} and len(rows) == 8
    own = [row["values"]["mean_absolute_error"] for row in rows if row["adapter"] == "cells/count"]
    assert sum(own) / 4 == pytest.approx(value["value"])
    assert re.search(r"prod.*cells/count@2|cells/count@2.*prod", output)


def test_an_app_of_a_fresh_process_swaps_it(walked):
    _, work, env, _ = walked
    code = next(one for one in blocks(PAGE, "python") if "finetune.load" in one)
    done = run([sys.executable, "-c", code + "\nprint(repr((answer, plain)))"], work, env)
    text, plain = eval(done.stdout.strip().splitlines()[-1])
    assert isinstance(text, str) and isinstance(plain, str)


def test_a_head_of_a_task_is_saved_published_and_swapped(walked):
    done, work, env, _ = walked
    assert "published cells/grade@1" in done.stdout
    manifest = json.loads((work / "runs" / "grade" / "adapter" / "manifest.json").read_text())
    assert [part["method"] for part in manifest["adapter"]["parts"]] == ["lora", "head"]
    assert manifest["adapter"]["tensors"]["lm_head.weight"]["shape"][0] == 4 and set(manifest["metrics"]) == {"test"}
    code = next(one for one in blocks(PAGE, "python") if "vlm.predict" in one)
    code += """
assert abs(sum(grade.scores.values()) - 1) < 1e-5 and set(grade.scores) == {"0", "1", "2", "3"}
from finetune.errors import FinetuneError
vlm.use("cells/count@prod")
number = vlm.predict("rows/image-0.png", "How many cells?")
assert number.unit == "cells", number
vlm.use("cells/grade@prod")
again = vlm.predict("rows/image-0.png", "How many cells?")
assert again == grade, (again, grade)
try:
    vlm.ask("rows/image-0.png", "How many cells?")
except FinetuneError as error:
    print(error)
"""
    done = run([sys.executable, "-c", code], work, env)
    assert "ask(image, question) does not support task grade on a counter base. Use predict" in done.stdout


def test_it_is_served(walked):
    _, work, env, _ = walked
    command = [sys.executable, "-m", "finetune.cli", "serve", "cells/count@prod", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, cwd=work, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://[\d.:]+", process.stdout.readline())[0]
            body = {"model": "cells/count@prod", "messages": [{"role": "user", "content": "How many cells?"}]}
            request = urllib.request.Request(
                f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                assert json.load(response)["choices"][0]["message"]["role"] == "assistant"
        finally:
            process.terminate()


def test_without_the_package_it_is_listed_and_refused_by_its_name(walked):
    _, work, _, without = walked
    assert "cells/count" in run(["finetune", "registry", "list"], work, without).stdout
    done = subprocess.run(
        ["finetune", "ask", "cells/count@prod", "rows/image-0.png", "How many?"],
        cwd=work, env=without, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        "names the package finetune-count (trained with version 1.0)" in done.stderr
        and "pip install finetune-count" in done.stderr
    )
    done = subprocess.run(
        ["finetune", "train", "count.yaml"], cwd=work, env=without, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "count.yaml: unknown task.name 'count'" in done.stderr

"""The pages of docs/ on the registry: their commands run as they stand there, and what they name exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def run_page(name, make_adapter, tmp_path):
    """Run all the commands of a page in a folder that holds an adapter; return what they said."""
    page = (DOCS / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    work = tmp_path / "work"
    (work / "runs" / "brain_mri").mkdir(parents=True)
    make_adapter().rename(work / "runs" / "brain_mri" / "adapter")
    command = tmp_path / "bin" / "finetune"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m finetune.cli "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=work,
        env=os.environ | {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.skipif(os.name == "nt", reason="the page is written for bash")
def test_the_registry(make_adapter, tmp_path):
    done = run_page("registry.md", make_adapter, tmp_path)
    assert done.stderr == ""
    assert "is fit to be shared" in done.stdout and "yanked medical/brain-mri@2: wrong rows" in done.stdout
    assert "published medical/brain-mri@3 (aliases: latest;" in done.stdout  # of the folder for the hub
    assert done.stdout.count(" 0 problems") == 1
    left = [path.name for path in (tmp_path / "work" / "registry" / "gc").rglob("*") if path.is_file()]
    assert left == []


@pytest.mark.skipif(os.name == "nt", reason="the page is written for bash")
def test_the_threat_model(make_adapter, tmp_path):
    done = run_page("threat-model.md", make_adapter, tmp_path)
    output = done.stdout
    assert "published medical/brain-mri@1 (aliases: latest, prod;" in output
    assert "signed by release (the policy: require)" in output
    assert "forgotten: medical/brain-mri in" in output
    assert re.search(r"^ref +medical/brain-mri@2$", output.rpartition("yanked medical/brain-mri@1")[2], re.MULTILINE)
    assert re.search(r"entries signed: 1 by release, 2 by release-2\n\d+ objects, \d+ bytes, 0 problems\n$", output), (
        output
    )
    warnings = [line for line in done.stderr.splitlines() if "which is revoked: laptop stolen" in line]
    assert len(warnings) == 2, done.stderr  # of the pull and the publish; the entry they leave is the new key's


def test_what_the_threat_model_names_exists():
    page = (DOCS / "threat-model.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:finetune|tests)/[\w/.]+)`", page))
    assert len(named) >= 12
    assert [path for path in named if not (ROOT / path).exists()] == []

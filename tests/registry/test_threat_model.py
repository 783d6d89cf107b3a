"""docs/threat-model.md: its commands run as they stand there, and what it names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")


@pytest.mark.skipif(os.name == "nt", reason="the page is written for bash")
def test_its_commands_run(make_adapter, tmp_path):
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
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
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "published medical/brain-mri@1 (aliases: latest, prod;" in said
    assert "signed by release (the policy: require)" in said
    assert "forgotten: medical/brain-mri in" in said
    assert re.search(r"^ref +medical/brain-mri@2$", said.rpartition("yanked medical/brain-mri@1")[2], re.MULTILINE)
    assert re.search(r"entries signed: 1 by release, 2 by release-2\n\d+ objects, \d+ bytes, 0 problems\n$", said), said
    warnings = [line for line in done.stderr.splitlines() if "whose key is revoked: laptop stolen" in line]
    assert len(warnings) == 2, done.stderr  # of the pull and the publish; the entry they leave is the new key's


def test_what_it_names_exists():
    named = set(re.findall(r"`((?:finetune|tests)/[\w/.]+)`", PAGE))
    assert len(named) >= 12
    assert [path for path in named if not (ROOT / path).exists()] == []

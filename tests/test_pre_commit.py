"""The hooks of pre-commit: the linter's pinned version, and exceptions that name files that stand."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
HOOKS = {hook["id"]: (repo["rev"], hook) for repo in CONFIG["repos"] for hook in repo["hooks"]}
# The first lines of keys in PEM, as https://github.com/pre-commit/pre-commit-hooks looks for them.
KINDS = ("", "RSA ", "DSA ", "EC ", "OPENSSH ", "SSH2 ENCRYPTED ", "PGP ", "ENCRYPTED ")
MARKS = [f"BEGIN {kind}PRIVATE KEY".encode() for kind in KINDS]


def tracked():
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_hooks_lint_by_the_pinned_version_and_refuse_large_files_and_keys():
    assert HOOKS.keys() == {"ruff-check", "ruff-format", "check-added-large-files", "detect-private-key"}
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert HOOKS["ruff-check"][0] == HOOKS["ruff-format"][0] == f"v{pinned}"
    assert f'"ruff=={pinned}"' in (ROOT / "pyproject.toml").read_text()


def test_only_the_pocket_models_weights_are_large():
    _, hook = HOOKS["check-added-large-files"]
    limit = int(hook["args"][0].removeprefix("--maxkb=")) * 1024
    large = [name for name in tracked() if (ROOT / name).stat().st_size > limit]
    assert large and all(re.search(hook["exclude"], name) for name in large)


def test_only_files_about_keys_hold_the_marks_of_keys():
    _, hook = HOOKS["detect-private-key"]
    texts = {name: (ROOT / name).read_bytes() for name in tracked()}
    holding = {name for name, text in texts.items() if any(mark in text for mark in MARKS)}
    assert holding == {name for name in texts if re.search(hook["exclude"], name)}

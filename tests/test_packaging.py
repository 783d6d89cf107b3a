"""The wheel and the source distribution: what they hold, and that a clean environment runs the core without torch."""

import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
]
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "gradio", "fastapi", "onnx", "gguf"}


@pytest.mark.parametrize("text", sorted(set(REQUIREMENTS)))
def test_a_requirement_is_pinned_to_a_version_that_it_allows(text):
    wanted = Requirement(text)
    if wanted.name == PROJECT["name"]:
        assert wanted.extras <= PROJECT["optional-dependencies"].keys()
    else:
        assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)])


def test_the_heavy_names_are_those_of_extras():
    names = {Requirement(text).name for text in REQUIREMENTS}
    assert names >= HEAVY and not HEAVY & {Requirement(text).name for text in PROJECT["dependencies"]}


def run(*words, env=None, cwd=None):
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=env or os.environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Return the wheel, the source distribution, and the wheel that is built from the latter."""
    folder = tmp_path_factory.mktemp("packaging")
    source, made = folder / "source", folder / "dist"
    shutil.copytree(ROOT / "finetune", source / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta as b; b.build_sdist({str(made)!r}); b.build_wheel({str(made)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (wheel,), (sdist,) = made.glob("*.whl"), made.glob("*.tar.gz")
    again = folder / "again"
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", again, sdist)
    (second,) = again.glob("*.whl")
    return wheel, sdist, second


def digests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/RECORD")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


@pytest.mark.slow
def test_both_hold_every_file_of_the_package_and_nothing_else(distributions):
    wheel, sdist, second = distributions
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "finetune").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = digests(wheel)
    assert {name for name in held if ".dist-info/" not in name} == package
    assert held == digests(second)
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert package | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not any(name.startswith("tests/") or name.endswith(".pyc") for name in {*held, *names})


@pytest.mark.slow
def test_the_metadata_is_that_of_the_project(distributions):
    wheel, _, _ = distributions
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = email.message_from_bytes(archive.read(name))
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    assert (found["Name"], found["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert found["Requires-Python"] == PROJECT["requires-python"]
    assert {*found.get_all("Provides-Extra")} == PROJECT["optional-dependencies"].keys()
    assert found.get_payload().startswith("# finetune-vlm")


@pytest.fixture(scope="module")
def clean(distributions, tmp_path_factory):
    """Return the Python of a fresh environment with the wheel and what it requires, and pip's own variables.

    Where pip cannot reach its index the test is skipped, or fails when FINETUNE_REQUIRE_SERVERS is 1.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [python, "-m", "pip", "--quiet", "install", "-c", ROOT / "constraints.txt", distributions[0]]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode and ("Retrying (" in done.stderr or "PIP_NO_INDEX" in env):  # else a pin may be wrong
        lacks = pytest.fail if os.environ.get("FINETUNE_REQUIRE_SERVERS") == "1" else pytest.skip
        lacks(f"pip cannot install from its index: {done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr
    return python, env


@pytest.mark.slow
def test_a_clean_environment_runs_the_core_without_torch(clean, tmp_path):
    python, env = clean
    env = env | {"HOME": str(tmp_path), "FINETUNE_REGISTRY": str(tmp_path / "registry"), "PYTHONNOUSERSITE": "1"}
    code = f"""
import importlib.util, sys
import finetune, finetune.plugins, finetune.preflight, finetune.recipe, finetune.registry, finetune.vllm_plugin
assert finetune.__file__.startswith(sys.prefix), finetune.__file__
print([name for name in {sorted(HEAVY)} if importlib.util.find_spec(name)])
"""
    assert run(python, "-c", code, env=env, cwd=tmp_path).strip() == "[]"
    command = python.with_name("finetune" + python.suffix)
    assert run(command, "--help", env=env, cwd=tmp_path).startswith("usage: finetune")
    assert PROJECT["version"] in run(command, "--version", env=env, cwd=tmp_path)
    assert "no adapters" in run(command, "registry", "list", env=env, cwd=tmp_path)
    assert run(command, "schema", env=env, cwd=tmp_path) == (ROOT / "docs" / "recipe.schema.json").read_text("utf-8")
    done = subprocess.run([command, "demo"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install 'finetune-vlm[torch]'" in done.stderr


@pytest.mark.slow
def test_the_source_distribution_installs_in_its_place(clean, distributions, tmp_path):
    python, env = clean
    pip = [python, "-m", "pip", "--quiet"]
    run(*pip, "install", "--no-deps", "--force-reinstall", distributions[1], env=env, cwd=tmp_path)
    run(*pip, "check", env=env, cwd=tmp_path)
    command = python.with_name("finetune" + python.suffix)
    assert run(command, "--help", env=env, cwd=tmp_path).startswith("usage: finetune")


@pytest.mark.slow
def test_a_clean_environment_finds_all_that_torch_needs(clean, distributions):
    """What the extra ``torch`` requires is found under its pins; the environment of the checkout has it installed."""
    python, env = clean
    wanted = f"{distributions[0]}[torch]"
    words = [python, "-m", "pip", "install", "--dry-run", "-c", ROOT / "constraints.txt", wanted]
    (line,) = re.findall(r"^Would install (.*)$", run(*words, env=env), re.MULTILINE)
    found = {canonicalize_name(name) for name in re.findall(r"(\S+)-[^-\s]+", line)}
    assert {"torch", "transformers", "peft", "accelerate", "datasets"} <= found

"""Which libraries an installation without extras works without, and what it says where one is missing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from finetune.core import extras
from finetune.errors import MissingExtraError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def _names(requirements):
    """Return the distributions that a list of requirements asks for."""
    return {requirement.split(">")[0].split("=")[0].strip() for requirement in requirements}


def test_each_library_stands_in_the_extra_that_is_named():
    optional = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    distribution = {"PIL": "pillow", "prometheus_client": "prometheus-client"}
    for extra, libraries in extras.LIBRARIES.items():
        assert {distribution.get(library, library) for library in libraries} <= _names(optional[extra])


def test_a_missing_library_is_named_with_its_extra():
    with (
        pytest.raises(MissingExtraError, match=r"needs onnx, .* 'finetune-vlm\[onnx\]'"),
        extras.missing_extras_named(),
    ):
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx.helper")


def test_another_missing_module_is_a_fault_of_ours():
    with pytest.raises(ModuleNotFoundError, match="finetune.nothing"), extras.missing_extras_named():
        import finetune.nothing  # noqa: F401


def test_the_registry_works_without_torch(tmp_path):
    code = """
import sys
for name in ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "PIL"):
    sys.modules[name] = None
from finetune.cli import main
print(main(["registry", "list"]), main(["ask", "base", sys.argv[1], "?", "--base", "pocket"]))
"""
    (tmp_path / "x.png").write_bytes(b"")
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.png")],
        capture_output=True,
        text=True,
        env={"FINETUNE_REGISTRY": str(tmp_path), "PATH": ""},
    )
    assert out.stdout.splitlines()[-1] == "0 2", out.stderr
    assert "pip install 'finetune-vlm[torch]'" in out.stderr

import hashlib
import os
import uuid
from pathlib import Path

import pytest

from finetune.adapters.manifest import AdapterManifest
from finetune.registry import AdapterRegistry
from tests.scores import scores_json
from tests.servers.azurite import Absent, azurite

SERVERS = ["azurite", pytest.param("ceph", marks=pytest.mark.ceph)]
EVERYWHERE = ["local", "memory", *SERVERS]


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FINETUNE_REGISTRY", raising=False)
    monkeypatch.delenv("FINETUNE_CACHE", raising=False)


@pytest.fixture
def no_sync(monkeypatch):
    """For tests of many writes that are not about power cuts."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def _describe(full_name: str, files: dict[str, bytes], seed: int) -> AdapterManifest:
    namespace, name = full_name.split("/")
    zero = "0" * 64
    entries = {n: {"sha256": hashlib.sha256(b).hexdigest(), "size": len(b)} for n, b in files.items()}
    return AdapterManifest.model_validate(
        {
            "namespace": namespace,
            "name": name,
            "created": "2031-01-01T00:00:00Z",
            "synthetic": True,
            "base": {
                "model_type": "toy",
                "files": {"model.safetensors": zero},
                "config": zero,
                "hub_id": "toy/base",
            },
            "processor": dict.fromkeys(("tokenizer", "processor_config", "chat_template", "generation_config"), zero),
            "adapter": {
                "peft_type": "LORA",
                "parts": [{"method": "lora", "options": {"r": 2}, "modules": {"language": ["model.layer"]}}],
                "tensors": {"model.layer.lora_A": {"shape": [2, 4], "dtype": "F32"}},
            },
            "task": {
                "name": "vqa",
                "question_template": "{question}",
                "max_new_tokens": 16,
                "answer_normalization": "vqa",
            },
            "toolchain": {"torch": "2"},
            "training": {
                "recipe_digest": zero,
                "data": {"train": zero},
                "rows": {"train": 8},
                "seed": seed,
                "steps": 3,
                "task": "vqa",
                "domain": namespace,
            },
            "metrics": {"base": scores_json(0.25), "test": scores_json(0.75)},
            "probe": {"version": 1, "seed": 0, "dtype": "float32", "base": [[0.0]] * 4, "adapter": [[1.0]] * 4},
            "files": entries,
        }
    )


@pytest.fixture
def make_adapter(tmp_path):
    """Return a function that writes a small valid adapter folder; another seed gives other weights."""

    def make(full_name: str = "medical/brain-mri", seed: int = 0, **more: bytes) -> Path:
        folder = tmp_path / "adapters" / f"{full_name.replace('/', '--')}-{seed}"
        folder.mkdir(parents=True)
        files = {
            "adapter_model.safetensors": f"weights {seed} of {full_name}".encode() * 50,
            "adapter_config.json": b'{"peft_type":"LORA"}',
            "README.md": f"# {full_name}\n".encode(),
        } | {name.replace("_dot_", "."): data for name, data in more.items()}
        for name, data in files.items():
            (folder / name).write_bytes(data)
        (folder / "manifest.json").write_bytes(_describe(full_name, files, seed).to_bytes())
        return folder

    return make


@pytest.fixture
def registry(tmp_path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "registry")


@pytest.fixture(scope="session")
def azurite_environment(tmp_path_factory):
    """The environment by which a server is found that runs as long as the tests do, with the container ``tests``."""
    try:
        with azurite("tests", tmp_path_factory.mktemp("azurite") / "log") as environment:
            yield environment
    except Absent as absent:
        # Where it must be, as in .ci/run, a test that is left out is a test that failed.
        (pytest.fail if os.environ.get("FINETUNE_REQUIRE_SERVERS") else pytest.skip)(str(absent))


@pytest.fixture(params=EVERYWHERE)
def location(request, tmp_path, monkeypatch):
    """An empty place of each kind, or of those that a test names (``indirect``)."""
    kind = request.param
    if kind == "local":
        return str(tmp_path / "deep" / "store")
    if kind == "memory":
        return "memory://"
    if kind == "azurite":
        for name, value in request.getfixturevalue("azurite_environment").items():
            monkeypatch.setenv(name, value)
        return f"az://tests/{uuid.uuid4().hex}/registry"
    if "FINETUNE_CEPH" not in os.environ:
        pytest.skip("no Ceph here: tests/servers/ceph.sh starts one and runs these tests")
    return f"{os.environ['FINETUNE_CEPH']}/{uuid.uuid4().hex}/registry"

"""A tiny base, adapters for it in a registry, and the few classes of vLLM that the plugin uses."""

import importlib.metadata
import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.assemble.loading import load_base
from finetune.registry import AdapterRegistry
from finetune.vllm_plugin.base import identify_served
from finetune.vllm_plugin.served import ServedAdapters
from tests.serving.adapters import make_adapter
from tests.tiny import save_fast_vlm

NAME = "testing/cell"
KINDS = ["lora", "rslora language", "dora", "lora", "wide lora"]  # of versions 1 to 5; 4 is of another base


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The folders of a tiny base and of a registry, which tests copy before they write to it."""
    folder = tmp_path_factory.mktemp("published")
    registry = AdapterRegistry(folder / "registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            make_adapter.__globals__["KINDS"], "rslora language", {"name": "lora", "r": 4, "use_rslora": True}
        )
        for version, kind in enumerate(KINDS, start=1):
            base = folder / ("other" if version == 4 else "base")
            if not base.exists():
                save_fast_vlm(base, seed=version)
            registry.publish(
                make_adapter(load_base(str(base), device="cpu"), kind, folder / str(version), seed=version)
            )
    registry.alias(NAME, "prod", 1)
    return SimpleNamespace(base=folder / "base", other=folder / "other", registry=folder / "registry")


@pytest.fixture
def registry(published, tmp_path):
    """A registry of this test's own."""
    shutil.copytree(published.registry, tmp_path / "own")
    return AdapterRegistry(tmp_path / "own")


@pytest.fixture
def base(published):
    """What is served, with room for rank 8."""
    return identify_served(str(published.base), revision=None, chat_template=None, max_lora_rank=8)


@pytest.fixture
def served(registry, base):
    """The adapters, each alias looked up at each request."""
    return ServedAdapters(registry, base, alias_seconds=0.0)


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LoRAResolver:
    pass


class Resolvers:
    """As vLLM's table of resolvers."""

    def __init__(self):
        self.resolvers = {}

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, resolver_name, resolver):
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name):
        return self.resolvers[resolver_name]


@pytest.fixture
def stand_in(monkeypatch):
    """Put modules in the place of vLLM's; ``tests/vllm`` has the real ones."""
    for name in [
        name for name in sys.modules if name in ("finetune.vllm_plugin.resolver", "finetune.vllm_plugin.endpoint")
    ]:
        monkeypatch.delitem(sys.modules, name)
    contents = {
        "vllm": {},
        "vllm.envs": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": True, "VLLM_SKIP_MODEL_NAME_VALIDATION": False},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": Resolvers()},
        "vllm.renderers": {},
        "vllm.renderers.chat_utils": {"load_chat_template": lambda path: path and Path(path).read_text()},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    versions = {"vllm": "0.33.0"}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    return SimpleNamespace(
        envs=sys.modules["vllm.envs"],
        resolvers=contents["vllm.lora.resolver"]["LoRAResolverRegistry"],
        versions=versions,
    )

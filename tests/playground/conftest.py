import shutil

import pytest

from finetune.adapters.manifest import MANIFEST_NAME, AdapterManifest
from finetune.assemble.loading import load_base
from finetune.registry import AdapterRegistry
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.serving.adapters import make_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny base, and the folders of two adapters of it."""
    from tests.tiny import FAMILIES

    folder = tmp_path_factory.mktemp("made")
    base = load_base(str(FAMILIES["smolvlm"](folder / "base")), device="cpu")
    names = {"first": "lora", "second": "prompt"}
    return base, {name: make_adapter(base, kind, folder / name, name=name) for name, kind in names.items()}


@pytest.fixture
def registry(made, tmp_path):
    """Hold ``testing/first`` (``prod``) and ``testing/second``, and ``testing/foreign`` of another base."""
    registry = AdapterRegistry(tmp_path / "registry")
    registry.publish(made[1]["first"], aliases=["prod"])
    registry.publish(made[1]["second"])
    registry.publish(altered(made[1]["first"], tmp_path / "foreign", name="foreign", base_config="0" * 64))
    return registry


@pytest.fixture
def vlm(made, registry):
    return VisionLanguageModel(made[0], registry=registry)


def altered(folder, target, *, name, base_config=None, **fields):
    """Return a copy of an adapter's folder whose manifest says something else."""
    shutil.copytree(folder, target)
    manifest = AdapterManifest.parse((folder / MANIFEST_NAME).read_bytes())
    if base_config:
        fields["base"] = manifest.base.model_copy(update={"config": base_config, "hub_id": "someone/other-base"})
    (target / MANIFEST_NAME).write_bytes(manifest.model_copy(update={"name": name, **fields}).to_bytes())
    return target

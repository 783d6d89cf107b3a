import pytest

from finetune.assemble.loading import load_base
from finetune.registry import AdapterRegistry
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.server.serving import Stage, running
from tests.serving.adapters import make_adapter
from tests.tiny import FAMILIES

ADAPTERS = {"first": "lora", "second": "wide lora", "third": "dora", "prompted": "prompt"}  # the last two do not share
REFS = [f"testing/{name}@prod" for name in ADAPTERS]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A tiny base, whose answers are sixteen tokens of nonsense."""
    return FAMILIES["smolvlm"](tmp_path_factory.mktemp("served") / "base")


@pytest.fixture(scope="session")
def registry_folder(base_folder):
    """A registry of adapters that each say something else."""
    folder = base_folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(folder / "cache"))
        base = load_base(str(base_folder), device="cpu")
        registry = AdapterRegistry(folder / "registry")
        for seed, (name, kind) in enumerate(ADAPTERS.items()):
            registry.publish(make_adapter(base, kind, folder / name, seed=seed, name=name), aliases=["prod"])
    return folder / "registry"


@pytest.fixture(scope="module")
def vlm(base_folder, registry_folder, tmp_path_factory):
    """The base on this registry; no adapter is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield VisionLanguageModel(load_base(str(base_folder), device="cpu"), registry=AdapterRegistry(registry_folder))


@pytest.fixture(scope="module")
def loaded(vlm):
    """The same, with all adapters loaded."""
    for ref in REFS:
        vlm.add(ref)
    return vlm


@pytest.fixture(scope="module")
def server(loaded):
    """A server of all adapters."""
    with running(loaded, REFS, request_seconds=60) as found:
        yield found


@pytest.fixture
def stage(monkeypatch):
    """Batches wait until the test lets them go on."""
    from finetune.server import scheduler

    stage = Stage(scheduler.answer_batch)
    monkeypatch.setattr(scheduler, "answer_batch", stage)
    yield stage
    stage.go_on(1000)

"""Adapters that a release saved load for ever, by folder and through a registry, and give the logits they gave."""

import hashlib

import numpy as np
import pytest
import yaml

from finetune.cli import main
from finetune.errors import TrustError, YankedError
from finetune.registry import AdapterRegistry, TrustPolicy
from tests.regression.bases import WEIGHTS
from tests.regression.nets import NETS, contents, each
from tests.regression.outputs import outputs, sample

# Another CPU's instructions add in another order: that moved logits by 4e-5 of the largest.
OF_LARGEST = 1e-4
# Of the difference that an adapter makes; the nets hold adapters only whose difference is far above that rounding.
OF_DIFFERENCE = 1e-3


def check_outputs(found, net, name):
    """Hold what a base and an adapter gave against what the release stored."""
    plain, adapted = map(sample, found)
    with np.load(net / "outputs.npz") as stored:
        was_plain, was_adapted = stored[f"{name}: base"], stored[f"{name}: adapter"]
    for now, was in ((plain, was_plain), (adapted, was_adapted)):
        assert now.shape == was.shape
        assert np.abs(now - was).max() <= OF_LARGEST * np.abs(was).max()
    effect, was_effect = adapted - plain, was_adapted - was_plain
    assert np.linalg.norm(effect - was_effect) <= OF_DIFFERENCE * np.linalg.norm(was_effect)


def where(net, family, bases):
    return {"base": bases[net] / family, "batch": net / "batches" / f"{family}.npz"}


@each("adapters")
def test_an_adapter_gives_by_folder_and_through_a_registry_what_it_gave(net, name, family, bases, tmp_path):
    by_folder = outputs(net / "adapters" / name, **where(net, family, bases))
    check_outputs(by_folder, net, name)
    registry = AdapterRegistry(tmp_path / "new-registry")
    version = registry.publish(net / "adapters" / name)
    assert version.digest == hashlib.sha256((net / "adapters" / name / "manifest.json").read_bytes()).hexdigest()
    by_name = outputs(f"regression/{name}@1", registry=tmp_path / "new-registry", **where(net, family, bases))
    assert all(np.array_equal(*pair) for pair in zip(by_folder, by_name, strict=True))


@each("registry")
@pytest.mark.filterwarnings("ignore:regression/colors@3 is yanked")
def test_a_version_of_the_stored_registry_gives_what_it_gave(net, name, family, bases, registry_copy):
    check_outputs(outputs(name, registry=registry_copy(net), **where(net, family, bases)), net, name)


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_the_stored_registry_is_clean_and_its_log_is_read(net, registry_copy, tmp_path):
    location = registry_copy(net)
    assert main(["registry", "verify", "--registry", str(location)]) == 0
    registry = AdapterRegistry(location)
    assert {version.full_name for version in registry.list()} == {"regression/colors", "regression/matching"}
    log = registry.log("regression/colors")
    assert [entry.op for entry in log] == ["publish"] * 3 + ["alias", "alias", "rollback", "yank"]
    assert registry.aliases("regression/colors") == {"prod": 1, "staging": 2, "latest": 2}
    assert registry.resolve("regression/colors@3").warning
    for ref in contents(net)["registry"]:
        version = registry.resolve(ref)
        folder = registry.pull(version, tmp_path / "pulled" / ref)
        assert hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() == version.digest


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_a_stored_signature_is_still_that_of_its_key(net, registry_copy):
    location = registry_copy(net)
    policy = yaml.safe_load((net / "trust.yaml").read_text(encoding="utf-8"))
    policy["namespaces"]["regression"]["signatures"] = "require"
    trusting = AdapterRegistry(location, trust=TrustPolicy.model_validate(policy))
    version = trusting.resolve("regression/matching@prod")
    assert version.signature and trusting.log("regression/matching")[0].signature
    assert trusting.pull(version).joinpath("manifest.sig").exists()
    with pytest.raises(TrustError, match="colors"):
        trusting.resolve("regression/colors@1")


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_the_stored_registry_can_be_written_on(net, registry_copy):
    registry = AdapterRegistry(registry_copy(net))
    version = registry.publish(registry.pull("regression/colors@1"), aliases=["prod"])
    assert version.version == 4 and registry.resolve("regression/colors@prod").version == 4
    registry.rollback("regression/colors", "prod")
    assert registry.resolve("regression/colors@prod").version == 1
    registry.yank("regression/colors@1", reason="old")
    with pytest.raises(YankedError):
        registry.resolve("regression/colors@prod")
    assert main(["registry", "verify", "--registry", registry.location]) == 0


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_a_stored_base_is_the_same_bytes_everywhere(net, bases):
    known = contents(net)["weights"]
    found = {
        folder.name: hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() for folder in bases[net].iterdir()
    }
    assert found == known


def test_all_that_is_stored_is_small():
    sizes = [path.stat().st_size for net in NETS for path in net.rglob("*") if path.is_file()]
    assert sum(sizes) < 3_000_000 * len(NETS)

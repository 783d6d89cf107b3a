"""The whole registry over every kind of store; real servers among them."""

import concurrent.futures
import itertools
import multiprocessing
from pathlib import Path

import pytest

from finetune.adapters.manifest import sha256_hex
from finetune.errors import IntegrityError, NotFoundError, YankedError
from finetune.registry import AdapterRegistry, default_cache, verify
from finetune.registry.log.hint import HINT_EVERY, read_hint
from finetune.registry.log.links import check_link
from tests.registry.conftest import SERVERS
from tests.registry.folders import same

NAME = "medical/brain-mri"
WRITERS, PUBLISHES = 4, 25


def test_the_walk(location, make_adapter, tmp_path):
    registry = AdapterRegistry(location)
    with pytest.raises(NotFoundError, match=f"there is no registry at {location}. The first publish makes one"):
        registry.resolve(NAME)
    assert registry.list() == []
    folders = [make_adapter(seed=seed) for seed in range(3)]
    versions = [registry.publish(folder, aliases=["prod"]) for folder in folders]
    registry.publish(make_adapter("retail/clothing", weights_dot_bin=bytes(9_000_000)))
    assert [version.ref for version in versions] == [f"{NAME}@{n}" for n in (1, 2, 3)]

    assert registry.resolve(f"{NAME}@prod") == versions[2]
    assert registry.resolve(f"{NAME}@sha256:{versions[0].digest}").version == 1
    registry.alias(NAME, "prod", 2, expect=3)
    registry.alias(NAME, "prod", 1, expect=2)
    assert registry.rollback(NAME, "prod").version == 2
    registry.yank(f"{NAME}@3", reason="wrong labels")
    assert registry.resolve(NAME).version == 2
    registry.yank(f"{NAME}@2")
    with pytest.raises(YankedError):
        registry.resolve(f"{NAME}@prod")
    registry.unyank(f"{NAME}@2")

    assert [v.ref for v in registry.list()] == [f"{NAME}@2", "retail/clothing@1"]
    assert [v.version for v in registry.list("medical", all_versions=True)] == [1, 2, 3]
    ops = ["publish"] * 3 + ["alias"] * 2 + ["rollback"] + ["yank"] * 2 + ["unyank"]
    assert [commit.op for commit in registry.log(NAME)] == ops

    pulled = registry.pull(f"{NAME}@3")
    assert pulled == default_cache() / versions[2].digest and same(pulled, folders[2])
    large = registry.pull("retail/clothing", tmp_path / "out")
    assert (large / "weights.bin").read_bytes() == bytes(9_000_000)
    report = verify(registry)
    assert report.problems == []
    assert report.objects == 1 + 10 + 4 + 8  # registry.json, entries, manifests, and files, some of which are the same


def test_a_flipped_bit_is_found_and_never_pulled(location, make_adapter):
    registry = AdapterRegistry(location)
    registry.publish(make_adapter())
    weights = max(registry.store.list("blobs"), key=lambda meta: meta.size)
    with registry.store.get(weights.key) as file:
        raw = bytearray(file.read())
    raw[7] ^= 1
    registry.store.put(weights.key, bytes(raw), mode="overwrite")
    with pytest.raises(IntegrityError, match=f"{weights.key}: its sha256 is"):
        registry.pull(NAME)
    (problem,) = verify(registry).problems
    assert problem.startswith(f"{weights.key}: its sha256 is")


def _publish_all(location: str, folders: list[str]) -> list[int]:
    registry = AdapterRegistry(location)
    return [registry.publish(folder).version for folder in folders]


@pytest.mark.distributed
@pytest.mark.parametrize("location", SERVERS, indirect=True)
def test_processes_that_publish_into_a_server_at_once_lose_nothing(location, make_adapter, capsys):
    """Four processes, 25 publishes each, one name; the first publish of all among them."""
    folders = [str(make_adapter(seed=n)) for n in range(WRITERS * PUBLISHES)]
    shares = [folders[n::WRITERS] for n in range(WRITERS)]
    # Not forked: obstore does not survive that.
    with concurrent.futures.ProcessPoolExecutor(WRITERS, multiprocessing.get_context("spawn")) as pool:
        versions = list(pool.map(_publish_all, itertools.repeat(location), shares))
    everyone = range(1, WRITERS * PUBLISHES + 1)
    assert sorted(sum(versions, [])) == [*everyone], "each writer was told a version of its own"
    registry = AdapterRegistry(location)
    log = registry.log(NAME)
    assert [commit.seq for commit in log] == [commit.version for commit in log] == [*everyone]
    assert [check_link(later, earlier) for earlier, later in itertools.pairwise(log)] == [[]] * (len(log) - 1)
    for share, published in zip(shares, versions, strict=True):
        manifests = [sha256_hex(Path(folder, "manifest.json").read_bytes()) for folder in share]
        assert [log[version - 1].manifest for version in published] == manifests
    hinted = [seq for seq, version in read_hint(registry.store, *NAME.split("/")) if seq == version]
    assert hinted and set(hinted) <= set(range(HINT_EVERY, len(log) + 1, HINT_EVERY))
    assert verify(registry).problems == []
    with capsys.disabled():
        print(f"\n{location.partition(':')[0]}: {len(log)} versions by {WRITERS} writers, dense, chain intact", end=" ")

import os
from pathlib import Path

import pytest

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.errors import FinetuneError, NotFoundError
from finetune.registry import AdapterRegistry, verify
from finetune.registry.log.commits import Commit
from tests.registry.folders import same

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def used(registry, make_adapter) -> AdapterRegistry:
    """Three versions, one of them of another adapter, and an alias."""
    registry.publish(make_adapter(seed=1))
    registry.alias("medical/brain-mri", "prod", 1)
    registry.publish(make_adapter(seed=2))
    registry.publish(make_adapter("retail/shoes"))
    return registry


def _objects(registry) -> dict[str, Path]:
    root = Path(registry.location)
    return {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}


def test_a_sound_registry_has_no_problems(used):
    report = verify(used)
    objects = _objects(used)
    assert report.problems == []
    assert report.objects == len(objects)
    assert report.bytes == sum(path.stat().st_size for path in objects.values())


def test_no_registry_is_no_sound_registry(tmp_path):
    with pytest.raises(NotFoundError, match="there is no registry at .*nowhere"):
        verify(AdapterRegistry(tmp_path / "nowhere"))


def test_one_flipped_bit_anywhere_is_found_by_name(used, tmp_path):
    """Every object, every twentieth byte of it and its last, one bit each; nothing wrong is ever pulled."""
    right = {ref: used.pull(ref) for ref in ("medical/brain-mri@1", "medical/brain-mri@2", "retail/shoes")}
    flips = 0
    for key, path in _objects(used).items():
        good = path.read_bytes()
        for place in {*range(0, len(good), 20), len(good) - 1}:
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
            flips += 1
            problems = verify(AdapterRegistry(used.location)).problems
            assert problems and problems[0].startswith(f"{key}: "), (key, place, problems)
        refused = 0
        for number, (ref, folder) in enumerate(right.items()):
            pulled = _pulled(used.location, ref, tmp_path / f"{flips}-{number}")
            refused += pulled is None
            assert pulled is None or same(pulled, folder)
        assert refused or "/log/" in key, f"nothing asked for {key}"
        path.write_bytes(good)
    assert verify(used).problems == []
    print(f"{flips} flipped bits in {len(_objects(used))} objects, each found")


def _pulled(location, ref, into):
    try:
        return AdapterRegistry(location).pull(ref, into)
    except FinetuneError:
        assert not into.exists()
        return None


def test_an_entry_without_a_checksum_is_found_by_its_successor(used):
    """Those of older programs have none."""
    path = Path(used.location, "names/medical/brain-mri/log/000000000001.json")
    old = Commit.parse(path.read_bytes(), source="1").model_copy(update={"schema_version": 2})
    path.write_bytes(old.model_copy(update={"time": "2031-01-01T00:00:00Z"}).to_bytes())
    (problem,) = verify(used).problems
    assert problem.startswith("names/medical/brain-mri/log/000000000002.json: its `prev` must be the digest")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "is not there"),
        (lambda path: path.write_bytes(b""), "bytes, got 0"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, got more"),
    ],
)
def test_missing_cut_and_longer_blobs(used, spoil, message):
    folder = used.pull("retail/shoes")
    digest = sha256_hex((folder / "adapter_model.safetensors").read_bytes())
    key = f"blobs/sha256/{digest[:2]}/{digest}"
    spoil(Path(used.location, key))
    (problem,) = verify(used).problems
    assert problem.startswith(f"{key}: ") and message in problem
    assert problem.endswith("(adapter_model.safetensors of retail/shoes@1)")


def test_a_missing_manifest(used):
    version = used.resolve("retail/shoes")
    Path(used.location, "blobs", "sha256", version.digest[:2], version.digest).unlink()
    (problem,) = verify(used).problems
    assert version.digest in problem and problem.endswith("(manifest of retail/shoes@1)")


def test_a_gap_in_a_log(used):
    Path(used.location, "names/medical/brain-mri/log/000000000002.json").unlink()
    assert verify(used).problems == [
        "names/medical/brain-mri/log/000000000002.json: the entry is missing, but entry 3 exists"
    ]


def test_an_entry_rewritten_with_its_successors_left(used):
    path = Path(used.location, "names/medical/brain-mri/log/000000000001.json")
    commit = Commit.parse(path.read_bytes(), source="1")
    path.write_bytes(commit.model_copy(update={"actor": "someone@else"}).to_bytes())
    (problem,) = verify(used).problems
    assert problem.startswith(
        "names/medical/brain-mri/log/000000000002.json: its `prev` must be the digest of the entry"
    )


def test_an_entry_that_praises_itself(used):
    path = Path(used.location, "names/retail/shoes/log/000000000001.json")
    commit = Commit.parse(path.read_bytes(), source="1")
    better = commit.summary | {"metrics": {"test": {"exact_match": 1.0}, "base": {"exact_match": 0.0}}}
    path.write_bytes(commit.model_copy(update={"summary": better}).to_bytes())
    (problem,) = verify(used).problems
    assert (
        "shoes/log/000000000001.json: its `summary` must be that of its manifest, and differs (blobs/sha256/" in problem
    )


def test_an_entry_that_names_the_manifest_of_another_adapter(used):
    path = Path(used.location, "names/retail/shoes/log/000000000001.json")
    other = used.resolve("medical/brain-mri")
    commit = Commit.parse(path.read_bytes(), source="1")
    path.write_bytes(commit.model_copy(update={"manifest": other.digest}).to_bytes())
    assert any(
        f"{other.digest}: must be a manifest of retail/shoes, whose log names it, got one of medical/brain-mri"
        in problem
        for problem in verify(used).problems
    )


def test_the_file_that_makes_it_a_registry(used):
    path = Path(used.location, "registry.json")
    path.write_bytes(canonical_json({"format": 9}))
    assert verify(used).problems == ["registry.json: `format` must be 1, got 9. Upgrade finetune to use this registry."]
    path.unlink()
    assert verify(used).problems == [
        "registry.json: the file is missing, and without it no command finds this registry. Restore a copy of it."
    ]


def test_what_is_not_part_of_a_registry_is_no_problem(used):
    root = Path(used.location)
    (root / ".DS_Store").write_text("")
    (root / "names" / "medical" / "brain-mri" / "log" / f".tmp-{'0' * 32}").write_text("left by the dead")
    (root / "names" / "README").write_text("hands off")
    os.mkdir(root / "names" / "empty")
    assert verify(used).problems == []

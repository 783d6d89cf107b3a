import errno
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from finetune.adapters.manifest import sha256_hex
from finetune.adapters.reference import AdapterRef
from finetune.errors import (
    AdapterReferenceError,
    ConflictError,
    IntegrityError,
    ManifestError,
    NotFoundError,
    RegistryError,
    StoreError,
)
from finetune.registry import AdapterRegistry, Version, default_cache, default_location, verify
from tests.registry.faulty import Interfering
from tests.registry.folders import same

pytestmark = pytest.mark.usefixtures("no_sync")

ROOT = Path(__file__).parents[2]


def edit(folder: Path, **fields) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Publish and resolve.


def test_the_walk(registry, make_adapter):
    first = registry.publish(make_adapter(seed=1))
    assert first.ref == "medical/brain-mri@1"
    assert first.aliases == ("latest",)
    second = registry.publish(make_adapter(seed=2), "medical/brain-mri", aliases=["prod", "v2"])
    assert (second.version, second.seq, second.aliases) == (2, 2, ("latest", "prod", "v2"))
    assert second.summary["metrics"] == {"before": {"accuracy": 0.25}, "after": {"accuracy": 0.75}}
    assert registry.resolve("medical/brain-mri") == registry.resolve("medical/brain-mri@prod") == second
    assert registry.resolve("medical/brain-mri@1").aliases == ()
    for ref in (first.ref, f"medical/brain-mri@sha256:{first.digest}", AdapterRef.parse(first.ref)):
        assert registry.resolve(ref).digest == first.digest
    back = registry.alias("medical/brain-mri", "prod", 1)
    assert (back.version, back.aliases) == (1, ("prod",))
    assert registry.resolve("medical/brain-mri@prod").ref == first.ref
    assert registry.resolve("medical/brain-mri") == second_without(second, "prod")
    assert [(c.op, c.version) for c in registry.log("medical/brain-mri")] == [
        ("publish", 1),
        ("publish", 2),
        ("alias", 2),
    ]
    assert verify(registry).problems == []


def second_without(version: Version, alias: str) -> Version:
    return Version(**vars(version) | {"aliases": tuple(a for a in version.aliases if a != alias)})


def test_what_lies_in_the_store(registry, make_adapter):
    folder = make_adapter()
    version = registry.publish(folder)
    root = Path(registry.location)
    about = json.loads((root / "registry.json").read_text())
    assert about["format"] == 1 and uuid.UUID(about["uuid"])
    digests = {p: sha256_hex(p.read_bytes()) for p in folder.iterdir()}
    assert digests[folder / "manifest.json"] == version.digest
    assert {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} == {
        "registry.json",
        "names/medical/brain-mri/log/000000000001.json",
        *(f"blobs/sha256/{d[:2]}/{d}" for d in digests.values()),
    }
    registry.publish(make_adapter("medical/other"))
    assert json.loads((root / "registry.json").read_text()) == about


def test_the_same_files_are_stored_once_and_versions_counted(registry, make_adapter):
    folder = make_adapter()
    assert registry.publish(folder).digest == registry.publish(folder).digest
    newest = registry.resolve("medical/brain-mri")
    assert newest.version == 2
    assert registry.resolve(f"medical/brain-mri@sha256:{newest.digest}").version == 2


def test_a_publish_tried_again_happens_once(registry, make_adapter):
    folder, txn = make_adapter(seed=1), uuid.uuid4().hex
    first = registry.publish(folder, txn=txn, aliases=["prod"])
    registry.publish(make_adapter(seed=2))
    assert registry.publish(folder, txn=txn, aliases=["prod"]) == first
    assert AdapterRegistry(registry.location).publish(folder, txn=txn) == first
    assert registry.resolve("medical/brain-mri").version == 2
    with pytest.raises(ConflictError, match=f"the txn {txn} is that of entry 1, which did something else"):
        registry.publish(make_adapter(seed=3), txn=txn)
    for wrong in ("", "mine", txn.upper() + "0"):
        with pytest.raises(RegistryError, match="this cannot be written to the log: txn: String should match"):
            registry.publish(folder, txn=wrong)


def test_one_alias_may_be_given_as_a_word(registry, make_adapter):
    assert registry.publish(make_adapter(), aliases="prod").aliases == ("latest", "prod")


@pytest.mark.parametrize("alias", ["Prod", "17", "../x", "a b", ""])
def test_bad_aliases_are_refused_before_anything_is_written(registry, make_adapter, alias):
    with pytest.raises(AdapterReferenceError, match="is no alias: an alias is a letter"):
        registry.publish(make_adapter(), aliases=[alias])
    assert not Path(registry.location).exists()


@pytest.mark.parametrize("name", ["../../etc", "medical/..", "/etc/passwd", "medical/brain-mri/../x", "medical/con"])
def test_traversal_names_are_refused_everywhere(registry, make_adapter, name):
    folder = make_adapter()
    registry.publish(folder)
    for call in (
        lambda: registry.publish(folder, name),
        lambda: registry.resolve(name),
        lambda: registry.pull(name),
        lambda: registry.log(name),
        lambda: registry.alias(name, "prod", 1),
        lambda: registry.list(name),
    ):
        with pytest.raises(AdapterReferenceError):
            call()
    namespace, _, last = name.partition("/")
    edit(folder, namespace=namespace or "x", name=last)
    with pytest.raises((ManifestError, AdapterReferenceError), match="namespace|name|device"):
        registry.publish(folder)
    assert [v.ref for v in registry.list()] == ["medical/brain-mri@1"]


def test_folders_that_are_not_what_the_manifest_says_are_refused(registry, make_adapter):
    seeds = iter(range(100))

    def refused(error, message, spoil):
        folder = make_adapter(seed=next(seeds))
        spoil(folder)
        with pytest.raises(error, match=message):
            registry.publish(folder)

    refused(IntegrityError, "lacks 'README.md', which its manifest lists", lambda f: (f / "README.md").unlink())
    refused(IntegrityError, "also holds 'x.bin', which its manifest does", lambda f: (f / "x.bin").write_text(""))
    refused(IntegrityError, "also holds 'sub', which its manifest does not", lambda f: (f / "sub").mkdir())
    refused(IntegrityError, "README.md: 19 bytes, but 20", lambda f: (f / "README.md").write_text("x" * 19))
    refused(IntegrityError, "README.md: longer than the 20", lambda f: (f / "README.md").write_text("x" * 2**21))
    refused(IntegrityError, "README.md: its sha256 is", lambda f: (f / "README.md").write_text("x" * 20))
    refused(
        ManifestError,
        "is no adapter folder: it holds no manifest.json",
        lambda f: (f / "manifest.json").unlink(),
    )
    refused(ManifestError, "manifest.json: not JSON", lambda f: (f / "manifest.json").write_text("{"))
    refused(ManifestError, "color: Extra inputs are not permitted", lambda f: edit(f, color=1))

    def link(name):
        def spoil(folder):
            os.rename(folder / name, folder.parent / "elsewhere")
            os.symlink(folder.parent / "elsewhere", folder / name)

        return spoil

    refused(IntegrityError, "'README.md' must be a plain file, not a link or a folder", link("README.md"))
    refused(ManifestError, "manifest.json: a symbolic link", link("manifest.json"))
    with pytest.raises(ManifestError, match="nowhere is no adapter folder"):
        registry.publish("nowhere")
    with pytest.raises(AdapterReferenceError, match="as 'retail/x': its manifest says 'medical/brain-mri'"):
        registry.publish(make_adapter(seed=1000), "retail/x")
    assert not Path(registry.location).exists()


def test_a_file_changed_while_it_is_stored_is_noticed(registry, make_adapter):
    folder = make_adapter()

    def change(verb, key):
        if key == "registry.json" and verb == "put":
            (folder / "README.md").write_text("X" * (folder / "README.md").stat().st_size)

    registry.store = Interfering(registry.store, change)
    with pytest.raises(IntegrityError, match="README.md: its sha256 is"):
        registry.publish(folder)
    assert registry.list() == []


def test_a_damaged_copy_in_the_store_is_not_built_upon(registry, make_adapter):
    folder = make_adapter()
    registry.publish(folder)
    digest = sha256_hex((folder / "README.md").read_bytes())
    blob = Path(registry.location, "blobs", "sha256", digest[:2], digest)
    blob.write_bytes(b"cut")
    with pytest.raises(
        IntegrityError, match=f"{digest} is damaged: 3 bytes instead of 20. Delete it and publish again"
    ):
        registry.publish(folder)
    blob.unlink()
    registry.publish(folder)
    assert verify(registry).problems == []


# What is not there.


def test_not_found_says_what_there_is(registry, make_adapter):
    with pytest.raises(NotFoundError, match="there is no registry at .*registry. The first publish makes one"):
        registry.resolve("medical/brain-mri")
    assert registry.list() == []
    registry.publish(make_adapter(seed=1))
    one = r"medical/brain-mri@2 does not exist. There are version 1, and the aliases latest \(1\)\."
    with pytest.raises(NotFoundError, match=one):
        registry.resolve("medical/brain-mri@2")
    registry.publish(make_adapter(seed=2), aliases=["prod"])
    registry.publish(make_adapter("retail/clothing"))
    with pytest.raises(NotFoundError, match=r"Did you mean 'medical/brain-mri'\? It holds: medical/brain-mri, retail"):
        registry.resolve("medical/brain-mir")
    with pytest.raises(
        NotFoundError, match=r"@prd does not exist. Did you mean 'prod'\? There are versions 1 to 2, and"
    ):
        registry.resolve("medical/brain-mri@prd")
    with pytest.raises(NotFoundError, match=r"@3 does not exist. There are .* aliases latest \(2\), prod \(2\)\."):
        registry.pull("medical/brain-mri@3")
    with pytest.raises(NotFoundError, match="@sha256:000.* does not exist"):
        registry.resolve("medical/brain-mri@sha256:" + "0" * 64)
    with pytest.raises(NotFoundError, match="no adapter 'medical/x' in"):
        registry.log("medical/x")
    with pytest.raises(NotFoundError, match="no adapter 'medical/x' in"):
        registry.alias("medical/x", "prod", 1)


def test_list_is_by_name_and_namespace(registry, make_adapter):
    for full_name in ("retail/shoes", "medical/brain-mri", "medical/chest-xray"):
        registry.publish(make_adapter(full_name))
    registry.publish(make_adapter("medical/brain-mri", seed=1))
    registry.alias("medical/brain-mri", "prod", 1)
    refs = ["medical/brain-mri@2", "medical/chest-xray@1", "retail/shoes@1"]
    assert [v.ref for v in registry.list()] == refs
    assert [v.ref for v in registry.list("medical")] == refs[:2]
    assert registry.list("nobody") == []
    assert registry.list()[0] == registry.resolve("medical/brain-mri")
    assert registry.list()[0].seq == 2
    Path(registry.location, "names", "medical", "notes.txt").write_text("not ours")
    assert len(registry.list()) == 3


def test_locations(monkeypatch, tmp_path):
    assert default_location() == str(tmp_path / "home" / ".finetune" / "registry")
    assert default_cache() == tmp_path / "home" / ".finetune" / "cache" / "adapters"
    monkeypatch.setenv("FINETUNE_REGISTRY", "/somewhere")
    monkeypatch.setenv("FINETUNE_CACHE", "~/there")
    assert AdapterRegistry().location == default_location() == "/somewhere"
    assert default_cache() == tmp_path / "home" / "there" / "adapters"
    for url in ("s3://bucket/registry", "file:///tmp/x", "gs://x"):
        with pytest.raises(StoreError, match=f"'{url}': only folders are supported as registries. Give a path"):
            AdapterRegistry(url)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"format":2}', RegistryError, "format 2, this program knows 1: upgrade finetune"),
        ("{", IntegrityError, "registry.json: not JSON"),
        ("[]", IntegrityError, "does not say the format"),
        ("{}", IntegrityError, "does not say the format"),
        (" " * 5000, IntegrityError, "registry.json: more than 4096 bytes"),
    ],
)
def test_registries_of_other_formats_are_left_alone(registry, make_adapter, content, error, message):
    Path(registry.location).mkdir()
    Path(registry.location, "registry.json").write_text(content)
    folder = make_adapter()
    for call in (registry.list, lambda: registry.resolve("a/b"), lambda: registry.publish(folder)):
        with pytest.raises(error, match=message):
            call()
    assert os.listdir(registry.location) == ["registry.json"]


# Aliases.


def test_expectations(registry, make_adapter):
    for seed in range(3):
        registry.publish(make_adapter(seed=seed))
    name = "medical/brain-mri"
    assert registry.alias(name, "prod", 1, expect=0).version == 1
    assert registry.alias(name, "prod", "latest", expect=1).version == 3
    message = "the alias 'prod' was expected to stand for version 1, but stands for version 3 .entry 5, by "
    with pytest.raises(ConflictError, match=message):
        registry.alias(name, "prod", 2, expect=1)
    with pytest.raises(ConflictError, match="expected to stand for none, but stands for version 3"):
        registry.alias(name, "prod", 2, expect=0)
    with pytest.raises(ConflictError, match="'test' was expected to stand for version 3, but stands for none"):
        registry.alias(name, "test", 2, expect=3)
    assert registry.log(name)[-1].expect == {"prod": 1}
    assert len(registry.log(name)) == 5


def test_an_expectation_is_looked_at_again_after_a_lost_race(registry, make_adapter):
    for seed in range(3):
        registry.publish(make_adapter(seed=seed))
    other = AdapterRegistry(registry.location)
    races = iter([1])

    def race(verb, key):
        if verb == "put" and next(races, None):
            other.alias("medical/brain-mri", "prod", 2)

    registry = AdapterRegistry(registry.location)
    registry.store = Interfering(registry.store, before=race)
    with pytest.raises(ConflictError, match="expected to stand for none, but stands for version 2"):
        registry.alias("medical/brain-mri", "prod", 1, expect=0)
    assert registry.resolve("medical/brain-mri@prod").version == 2


def test_alias_targets(registry, make_adapter):
    for seed in range(2):
        version = registry.publish(make_adapter(seed=seed))
    name = "medical/brain-mri"
    for target, number in ((1, 1), ("2", 2), ("latest", 2), (f"sha256:{version.digest}", 2)):
        assert registry.alias(name, "prod", target).version == number
    entries = len(registry.log(name))
    assert registry.alias(name, "prod", 2).aliases == ("latest", "prod")
    assert len(registry.log(name)) == entries
    with pytest.raises(NotFoundError, match="medical/brain-mri@9 does not exist. There are versions 1 to 2"):
        registry.alias(name, "prod", 9)
    with pytest.raises(NotFoundError, match=r"@prox does not exist. Did you mean 'prod'\?"):
        registry.alias(name, "new", "prox")
    with pytest.raises(AdapterReferenceError, match="the alias 'latest' is moved by publish only"):
        registry.alias(name, "latest", 1)
    with pytest.raises(AdapterReferenceError, match="is no adapter reference"):
        registry.alias(name, "prod", -1)
    with pytest.raises(AdapterReferenceError, match="says a version; here the form is ns/name"):
        registry.alias(f"{name}@1", "prod", 1)


# Pull.


def test_pull_gives_the_folder_back(registry, make_adapter, tmp_path):
    folder = make_adapter()
    version = registry.publish(folder)
    cached = registry.pull("medical/brain-mri")
    assert cached == default_cache() / version.digest
    assert same(cached, folder)
    into = registry.pull(version.ref, tmp_path / "a" / "b")
    assert into == tmp_path / "a" / "b" and same(into, folder)
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(default_cache()) == [version.digest]
    (tmp_path / "empty").mkdir()
    assert same(registry.pull(version.ref, str(tmp_path / "empty")), folder)


def test_a_folder_that_is_right_is_left_as_it_is(registry, make_adapter, tmp_path):
    registry.publish(make_adapter())
    for into in (None, tmp_path / "out"):
        folder = registry.pull("medical/brain-mri", into)
        before = folder.stat().st_ino
        assert registry.pull("medical/brain-mri", into).stat().st_ino == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "README.md").write_bytes(b"X" + (f / "README.md").read_bytes()[1:]),
        lambda f: (f / "README.md").unlink(),
        lambda f: (f / "manifest.json").write_text("{}"),
        lambda f: (f / "manifest.json").unlink(),
        lambda f: (f / "adapter_model.bin").write_text("pickle"),
        lambda f: (f.rename(f.parent / "moved"), f.write_text("a file")),
        lambda f: (f.rename(f.parent / "moved"), os.symlink(f.parent / "void", f)),
    ],
)
def test_a_spoilt_cache_is_built_anew(registry, make_adapter, spoil):
    folder = make_adapter()
    registry.publish(folder)
    spoil(registry.pull("medical/brain-mri"))
    assert same(registry.pull("medical/brain-mri"), folder)
    assert [p.name for p in default_cache().iterdir() if p.name.startswith(".")] == []


def test_what_a_user_has_is_never_replaced(registry, make_adapter, tmp_path):
    registry.publish(make_adapter())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(StoreError, match="mine holds something else already. Choose a folder that does not exist yet"):
        registry.pull("medical/brain-mri", tmp_path / "mine")
    with pytest.raises(StoreError, match="thesis.txt holds something else already"):
        registry.pull("medical/brain-mri", tmp_path / "mine" / "thesis.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_nothing_damaged_is_pulled(registry, make_adapter, tmp_path):
    folder = make_adapter()
    version = registry.publish(folder)
    for path in folder.iterdir():
        digest = sha256_hex(path.read_bytes())
        blob = Path(registry.location, "blobs", "sha256", digest[:2], digest)
        blob.write_bytes(b"X" + path.read_bytes()[1:])
        with pytest.raises(IntegrityError, match=f"{digest}: its sha256 is"):
            registry.pull(version.ref, tmp_path / "out")
        blob.unlink()
        with pytest.raises(IntegrityError, match=f"@1 cannot be pulled, the registry is damaged: .*{digest} is not"):
            registry.pull(version.ref, tmp_path / "out")
        blob.write_bytes(path.read_bytes())
    assert not (tmp_path / "out").exists()
    assert same(registry.pull(version.ref, tmp_path / "out"), folder)


def test_a_log_copied_to_another_name_gives_nothing(registry, make_adapter):
    registry.publish(make_adapter())
    root = Path(registry.location, "names")
    (root / "retail").mkdir()
    os.rename(root / "medical" / "brain-mri", root / "retail" / "shoes")
    with pytest.raises(IntegrityError, match="a manifest of medical/brain-mri, but the log of retail/shoes names it"):
        registry.pull("retail/shoes")


@pytest.mark.parametrize(("function", "number"), [("fsync", errno.ENOSPC), ("mkdir", errno.EACCES)])
def test_a_full_disk_while_pulling(registry, make_adapter, tmp_path, monkeypatch, function, number):
    registry.publish(make_adapter())

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(StoreError, match=r"cannot write .*out: .* another folder \(--into or FINETUNE_CACHE\)"):
            registry.pull("medical/brain-mri", tmp_path / "deep" / "out")
    assert [p for p in tmp_path.rglob("*") if p.name == "out" or p.name.startswith(".pull")] == []
    registry.pull("medical/brain-mri", tmp_path / "deep" / "out")


# Weight.


def _python(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def test_nothing_heavy_is_imported():
    code = """
import sys
import finetune.registry, finetune.registry.commands, finetune.adapters.reference
print(sorted({"torch", "transformers", "datasets", "peft", "accelerate", "numpy"} & set(sys.modules)))
"""
    assert _python(code) == "[]"


def test_many_names_are_listed_without_weight(registry, make_adapter, no_sync):
    for number in range(150):
        registry.publish(make_adapter(f"team{number % 7}/adapter-{number}"))
    code = """
import sys
from finetune.registry import AdapterRegistry
versions = AdapterRegistry(sys.argv[1]).list()
print(len(versions), "torch" in sys.modules)
"""
    assert _python(code, registry.location) == "150 False"

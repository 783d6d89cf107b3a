"""The registry as a whole: one walk, what is not there, where it is, and what it imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.adapters.reference import AdapterRef
from finetune.errors import (
    AdapterReferenceError,
    IntegrityError,
    ManifestError,
    MissingExtraError,
    NotFoundError,
    RegistryError,
    StoreError,
)
from finetune.registry import AdapterRegistry, Version, default_cache, default_location, verify
from tests.registry.folders import edit

pytestmark = pytest.mark.usefixtures("no_sync")

ROOT = Path(__file__).parents[2]


def test_the_walk(registry, make_adapter):
    first = registry.publish(make_adapter(seed=1))
    assert first.ref == "medical/brain-mri@1"
    assert first.aliases == ("latest",)
    second = registry.publish(make_adapter(seed=2), "medical/brain-mri", aliases=["prod", "v2"])
    assert (second.version, second.seq, second.aliases) == (2, 2, ("latest", "prod", "v2"))
    assert second.summary["metrics"] == {
        who: {
            "exact_match": value,
            "majority.exact_match": 0.5,
            "blank_image.exact_match": 0.25,
            "n": 40,
            "truncated": 0,
        }
        for who, value in (("base", 0.25), ("test", 0.75))
    }
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


# What is not there.


def test_not_found_lists_what_exists(registry, make_adapter):
    with pytest.raises(NotFoundError, match="there is no registry at .*registry. The first publish makes one"):
        registry.resolve("medical/brain-mri")
    assert registry.list() == []
    registry.publish(make_adapter(seed=1))
    one = r"medical/brain-mri@2 does not exist. medical/brain-mri has version 1, and the aliases latest \(1\)\."
    with pytest.raises(NotFoundError, match=one):
        registry.resolve("medical/brain-mri@2")
    registry.publish(make_adapter(seed=2), aliases=["prod"])
    registry.publish(make_adapter("retail/clothing"))
    with pytest.raises(
        NotFoundError, match=r"Did you mean 'medical/brain-mri'\? Adapters there: medical/brain-mri, retail"
    ):
        registry.resolve("medical/brain-mir")
    with pytest.raises(
        NotFoundError, match=r"@prd does not exist. Did you mean 'prod'\? medical/brain-mri has versions 1 to 2, and"
    ):
        registry.resolve("medical/brain-mri@prd")
    with pytest.raises(
        NotFoundError, match=r"@3 does not exist. medical/brain-mri has .* aliases latest \(2\), prod \(2\)\."
    ):
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


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (
            "file:///tmp/x",
            "the location of a registry must be a folder, or a URL that begins with s3://, gs://, az://, memory",
        ),
        ("S3://bucket", "must be a folder, or a URL that begins with .*; got 'S3://bucket'"),
        (
            Path("s3://bucket/registry"),
            "must have '//' after the colon, got 's3:/bucket/registry'. Give it as a string",
        ),
        ("memory://mine", "a registry in memory must be memory:// without a name, got 'memory://mine'"),
        ("s3://", "a registry must be s3://bucket or s3://bucket/team/registry, with parts of a-z"),
        ("gs://bucket/../x", "a registry must be gs://bucket or gs://bucket/team/registry"),
        ("az://bucket/a b", "a registry must be az://bucket"),
    ],
)
def test_an_invalid_location_is_refused_with_the_valid_forms(location, message):
    with pytest.raises(StoreError, match=message):
        AdapterRegistry(location)


def test_the_error_of_a_missing_extra_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "finetune.registry.storage.object_store", raising=False)
    with pytest.raises(MissingExtraError, match=r"needs obstore, .* pip install 'finetune-vlm\[object"):
        AdapterRegistry("s3://bucket/registry")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"format":2}', RegistryError, "`format` must be 1, got 2. Upgrade finetune"),
        ("{", IntegrityError, "registry.json: not JSON"),
        ("[]", IntegrityError, "`format` must be a number, got NoneType"),
        ("{}", IntegrityError, "`format` must be a number, got NoneType"),
        (" " * 5000, IntegrityError, "registry.json: must have at most 4096 bytes, got more"),
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


# Weight.


def _python(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def test_nothing_heavy_is_imported():
    code = """
import sys
import finetune.registry, finetune.registry.cli, finetune.adapters.reference
print(sorted({"torch", "transformers", "datasets", "peft", "accelerate", "numpy", "obstore"} & set(sys.modules)))
"""
    assert _python(code) == "[]"


@pytest.mark.parametrize(
    "words", [["--help"], ["registry", "--help"], ["registry", "gc", "--help"], ["registry", "list"]]
)
def test_the_command_answers_without_weight(words):
    """It takes as long as its imports: .25 s of CPU, where torch alone takes 2."""
    code = """
import contextlib, io, sys
from finetune.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(sys.argv[1:])
heavy = {"torch", "transformers", "datasets", "peft", "numpy", "PIL", "obstore", "cryptography", "huggingface_hub"}
print(len(out.getvalue()) > 20, sorted(heavy & set(sys.modules)))
"""
    assert _python(code, *words) == "True []"


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

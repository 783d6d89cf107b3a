"""Mirrors in an OCI registry: Debian's docker-registry on loopback."""

import base64
import json
import shutil
from pathlib import Path

import pytest

from finetune.adapters.manifest import FileEntry, canonical_json, sha256_hex
from finetune.cli import main
from finetune.errors import ConflictError, FinetuneError, IntegrityError, NotFoundError, StoreError
from finetune.registry import AdapterRegistry
from finetune.registry.transfer.oci import fetch_from_oci, push_to_oci
from finetune.registry.transfer.oci_client import OciRef, OciRepository
from tests.registry.folders import same
from tests.servers.docker_registry import docker_registry

pytestmark = pytest.mark.usefixtures("no_sync")
NAME = "medical/brain-mri"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oci") / "server"
    with docker_registry(folder) as host:
        yield host, folder / "data" / "docker" / "registry" / "v2"


@pytest.fixture
def place(server, request):
    """A repository of its own for each test."""
    words = "".join(c if c.isalnum() else " " for c in request.node.name.lower()).split()
    return f"{server[0]}/tests/{'-'.join(words)}"


@pytest.fixture
def blob_path(server):
    """Return a function that returns where the server keeps a blob."""
    return lambda digest: server[1] / "blobs" / "sha256" / digest[:2] / digest / "data"


@pytest.fixture
def pushed(registry, make_adapter, place):
    """A version that is there, and the folder that it was published from."""
    folder = make_adapter()
    return push_to_oci(registry, registry.publish(folder), OciRef.parse(place)), folder


def _files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_version_goes_up_and_comes_down(registry, make_adapter, place, tmp_path):
    folder = make_adapter()
    version = registry.publish(folder)
    done = push_to_oci(registry, version, OciRef.parse(place))
    assert str(done).startswith(f"{place}@sha256:")
    for n, ref in enumerate((done, OciRef.parse(f"{place}:1"))):
        into = tmp_path / "down" / str(n)
        assert fetch_from_oci(ref, into) == done
        assert same(into, folder)
        assert AdapterRegistry(tmp_path / f"other{n}").publish(into).digest == version.digest


def test_what_is_there_is_not_sent_again(registry, server, pushed, make_adapter, place):
    done, _ = pushed
    before = _files(server[1])
    assert push_to_oci(registry, registry.resolve(NAME), OciRef.parse(f"{place}:1")) == done
    assert _files(server[1]) == before
    other = AdapterRegistry(f"{registry.location}-2")
    shutil.rmtree(Path(make_adapter(NAME, seed=1)))
    assert push_to_oci(other, other.publish(pushed[1]), OciRef.parse(place)) == done, "equal versions, equal artifacts"


def test_the_artifact_has_its_type(registry, pushed, place):
    done, folder = pushed
    with OciRepository(done) as repository:
        digest, raw = repository.get_manifest("1")
    artifact = json.loads(raw)
    assert (digest, sha256_hex(raw)) == (done.digest, done.digest)
    assert artifact["artifactType"] == "application/vnd.finetune-vlm.adapter.v1"
    version = registry.resolve(NAME)
    assert artifact["config"]["digest"] == f"sha256:{version.digest}"
    assert artifact["annotations"]["org.opencontainers.image.title"] == NAME
    assert artifact["annotations"]["org.opencontainers.image.version"] == "1"
    assert artifact["annotations"]["org.finetune-vlm.digest"] == f"sha256:{version.digest}"
    titles = {layer["annotations"]["org.opencontainers.image.title"]: layer for layer in artifact["layers"]}
    assert titles.keys() == {p.name for p in folder.iterdir()}
    for name, layer in titles.items():
        data = (folder / name).read_bytes()
        assert (layer["digest"], layer["size"]) == (f"sha256:{sha256_hex(data)}", len(data))


def test_a_tag_that_is_taken_never_moves(registry, server, pushed, make_adapter, place):
    second = registry.publish(make_adapter(seed=1))
    before = _files(server[1])
    with pytest.raises(ConflictError, match=f"{place}:1 points to another artifact, sha256:.{{64}}. Nothing was"):
        push_to_oci(registry, second, OciRef.parse(f"{place}:1"))
    assert _files(server[1]) == before
    done = push_to_oci(registry, second, OciRef.parse(f"{place}:stable"))
    assert done.digest != pushed[0].digest
    assert push_to_oci(registry, second, OciRef.parse(place)) == done, "under its own number too"


def test_a_tag_that_is_moved_meanwhile_is_noticed(registry, pushed, make_adapter, place, monkeypatch):
    """The registry honours no condition, so the tag is read again."""
    put = OciRepository.put_manifest
    with OciRepository(pushed[0]) as repository:
        _, other = repository.get_manifest("1")

    def overtaken(self, reference, raw):
        put(self, reference, raw)
        put(self, reference, other)

    monkeypatch.setattr(OciRepository, "put_manifest", overtaken)
    second = registry.publish(make_adapter(seed=1))
    with pytest.raises(
        ConflictError, match=f"another client moved {place}:2 meanwhile, to sha256:{pushed[0].digest}. Try again"
    ):
        push_to_oci(registry, second, OciRef.parse(place))


def test_every_damaged_byte_is_found(pushed, blob_path, tmp_path):
    done, folder = pushed
    for digest in (done.digest, *(sha256_hex(path.read_bytes()) for path in folder.iterdir())):
        stored = blob_path(digest)
        whole = stored.read_bytes()
        stored.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(FinetuneError):
            fetch_from_oci(done, tmp_path / "down")
        stored.write_bytes(whole)
    assert not (tmp_path / "down").exists() and [p.name for p in tmp_path.iterdir() if p.name[0] == "."] == []


def _artifact_with(pushed, change) -> OciRef:
    """Put another artifact beside the one that was pushed, and return its reference."""
    with OciRepository(pushed) as repository:
        artifact = json.loads(repository.get_manifest(f"sha256:{pushed.digest}")[1])
        raw = change(artifact)
        raw = canonical_json(artifact) if raw is None else raw
        repository.put_manifest("evil", raw)
    return OciRef(host=pushed.host, repository=pushed.repository, digest=sha256_hex(raw))


def _add(artifact, title, **changes):
    layer = {**artifact["layers"][0], **changes}
    artifact["layers"].append({**layer, "annotations": {"org.opencontainers.image.title": title}})


def _retitle(artifact, title):
    artifact["layers"][0]["annotations"]["org.opencontainers.image.title"] = title


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: _retitle(a, "../../evil"), r"the title of a layer must be the name of a file, got '\.\./\.\./evil'"),
        (lambda a: _retitle(a, "/tmp/evil"), "must be the name of a file, got '/tmp/evil'"),
        (lambda a: _retitle(a, ".git"), "must be the name of a file, got '.git'"),
        (lambda a: _retitle(a, "evil.sh"), "its layers must be the files that the adapter's manifest lists"),
        (lambda a: _add(a, "evil.sh"), "also holds 'evil.sh', which its manifest does not list"),
        (lambda a: _add(a, "README.md"), "the title of a layer must be unique, but 'README.md' is given twice"),
        (lambda a: _add(a, "large.bin", size=70_000), "its layers must be the files that the adapter's manifest lists"),
        (
            lambda a: _retitle(a, "manifest.json"),
            "the title of a layer must be unique, but 'manifest.json' is given twice",
        ),
        (lambda a: a["layers"][0]["annotations"].clear(), "must be the name of a file, got ''"),
        (lambda a: a["layers"].pop() and None, "its layers must be the files"),
        (lambda a: a["layers"].append(a["layers"][0]), "the title of a layer must be unique, but '.+' is given twice"),
        (lambda a: a["layers"][0].update(digest=a["layers"][1]["digest"]), "its layers must be the files"),
        (lambda a: a["layers"][0].update(size=1), "its layers must be the files"),
        (lambda a: a["layers"][0].update(urls=["http://elsewhere.example/x"]), "layers.0.urls: Extra inputs"),
        (
            lambda a: a["config"].update(digest=a["layers"][0]["digest"], size=a["layers"][0]["size"]),
            "not JSON|manifest",
        ),
        (
            lambda a: a["config"].update(mediaType="application/vnd.oci.image.config.v1+json"),
            "its config must be application.* of at most .*got application",
        ),
        (lambda a: a["config"].update(size=2**40), "its config must be application.* of at most .*got application"),
        (lambda a: a.update(artifactType="application/vnd.other"), "not an adapter of finetune-vlm: artifactType"),
        (lambda a: a.pop("artifactType") and None, "not an adapter of finetune-vlm: artifactType: Field required"),
        (
            lambda a: canonical_json(a).replace(b'"layers":', b'"layers":[],"layers":'),
            "a key must be unique, but 'layers' is given twice",
        ),
    ],
)
def test_what_is_no_adapter_is_refused(pushed, tmp_path, change, message):
    evil = _artifact_with(pushed[0], change)
    with pytest.raises(FinetuneError, match=message):
        fetch_from_oci(evil, tmp_path / "down")
    assert not (tmp_path / "down").exists() and not list(tmp_path.rglob("evil"))


def test_a_folder_is_never_replaced(pushed, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(StoreError, match=r"mine holds something already. Choose a folder that does not exist yet \("):
        fetch_from_oci(pushed[0], tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_is_not_there_is_named(registry, pushed, place, tmp_path):
    for ref in (f"{place}:99", f"{place}-2:1", f"{place}@sha256:{'0' * 64}"):
        with pytest.raises(NotFoundError, match=f"there is no artifact {ref}"):
            fetch_from_oci(OciRef.parse(ref), tmp_path / "down")
    with pytest.raises(StoreError, match="must have a tag or a digest, such as"):
        fetch_from_oci(OciRef.parse(place), tmp_path / "down")
    with pytest.raises(StoreError, match="must not have a digest, which is known only afterwards"):
        push_to_oci(registry, registry.resolve(NAME), pushed[0])


def test_a_damaged_version_is_not_pushed(registry, make_adapter, place):
    folder = make_adapter()
    version = registry.publish(folder)
    digest = sha256_hex((folder / "adapter_model.safetensors").read_bytes())
    blob = Path(registry.location, "blobs", "sha256", digest[:2], digest)
    blob.write_bytes(b"X" + blob.read_bytes()[1:])
    with pytest.raises(IntegrityError, match=f"{digest}: its sha256 is"):
        push_to_oci(registry, version, OciRef.parse(place))
    with OciRepository(OciRef.parse(place)) as repository:
        assert repository.get_manifest("1") is None


def test_the_server_refuses_a_blob_of_another_digest(place, tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    with OciRepository(OciRef.parse(place)) as repository:
        with pytest.raises(IntegrityError, match="file: its sha256 is"):
            repository.put_blob(FileEntry(sha256="0" * 64, size=3), tmp_path / "file")
        entry = FileEntry(sha256=sha256_hex(b"abc"), size=3)
        assert not repository.has_blob(entry)
        repository.put_blob(entry, tmp_path / "file")
        assert repository.has_blob(entry) and b"".join(repository.get_blob(entry)) == b"abc"


def test_the_commands(registry, make_adapter, place, capsys, tmp_path):
    folder = make_adapter()
    registry.publish(folder, aliases=["prod"])
    words = ["registry", "mirror", f"{NAME}@prod", "--oci", f"{place}:17", "--registry", registry.location]
    assert main(words) == 0
    ref = capsys.readouterr().out.strip()
    assert ref.startswith(f"{place}@sha256:")
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"oci": ref, "digest": ref.split("@")[1]}
    into = str(tmp_path / "down")
    assert main(["registry", "fetch-oci", f"{place}:17", "--into", into]) == 0
    assert capsys.readouterr().out == f"{into} is {ref}\n" and same(Path(into), folder)
    assert main(["registry", "fetch-oci", f"{place}:17", "--into", into]) == 2
    assert "holds something already" in capsys.readouterr().err
    assert main(["registry", "fetch-oci", "nonsense", "--into", into]) == 2
    assert "a reference to an OCI registry must be HOST/REPOSITORY" in capsys.readouterr().err


def test_a_password_is_the_one_of_docker_login(registry, make_adapter, tmp_path, monkeypatch):
    version = registry.publish(make_adapter())
    # The password is sesame.
    htpasswd = "ali:$2b$05$abcdefghijklmnopqrstuuKcS.CYWVYVaLiiCKrrc0A5s3mGesJ9O\n"
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()
    with docker_registry(tmp_path / "server", htpasswd=htpasswd) as host:
        ref = OciRef.parse(f"{host}/{NAME}")

        def keep(password):
            auths = {host: {"auth": base64.b64encode(f"ali:{password}".encode()).decode()}}
            (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": auths}))

        refused = f"{ref}: the registry refused: 401 Unauthorized.*UNAUTHORIZED.*Log in with `docker login {host}`"
        with pytest.raises(StoreError, match=refused):
            push_to_oci(registry, version, ref)
        keep("wrong")
        with pytest.raises(StoreError, match=refused):
            push_to_oci(registry, version, ref)
        keep("sesame")
        done = push_to_oci(registry, version, ref)
        fetch_from_oci(done, tmp_path / "down")
        assert same(tmp_path / "down", registry.pull(version))
        (tmp_path / "docker" / "config.json").write_text("{]")
        with pytest.raises(StoreError, match=f"config.json: cannot read the password for {host}"):
            fetch_from_oci(done, tmp_path / "again")

"""A version as an artifact of an OCI registry: an image manifest, and the adapter's files as its layers.

The config is the adapter's manifest, so the config's digest is that of the version. Each layer has the name of a file
as its title, and one layer is the adapter's manifest, so any client that pulls the artifact gets an adapter folder.
Equal versions give equal artifacts. Tags of OCI registries can move, and a write cannot have a condition. So a push
reads the tag before and after it writes it, and returns the digest.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.adapters.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    AdapterManifest,
    FileEntry,
    canonical_json,
    sha256_hex,
    strict_json,
)
from finetune.errors import ConflictError, IntegrityError, NotFoundError, StoreError, brief
from finetune.registry.log.commits import first_problem
from finetune.registry.log.versions import Version
from finetune.registry.registry import AdapterRegistry
from finetune.registry.storage.adapter_folders import check_folder, read_manifest
from finetune.registry.storage.store import is_key
from finetune.registry.transfer import oci_client
from finetune.registry.transfer.mirror_folder import new_folder
from finetune.registry.transfer.oci_client import OciRef, OciRepository

CONFIG_TYPE = "application/vnd.finetune-vlm.manifest.v1+json"
LAYER_TYPE = "application/octet-stream"
TITLE = "org.opencontainers.image.title"
MAX_UNLISTED_BYTES = 65536  # of a file that the adapter's manifest does not list; only small ones are allowed
_ELSEWHERE = " (--into)"

_Strict = ConfigDict(frozen=True, extra="forbid", strict=True)
_Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Descriptor(BaseModel):
    model_config = _Strict

    mediaType: str
    digest: _Digest
    size: Annotated[int, Field(ge=0)]
    annotations: dict[str, str] = {}

    @property
    def entry(self) -> FileEntry:
        return FileEntry(sha256=self.digest.removeprefix("sha256:"), size=self.size)


class _Artifact(BaseModel):
    model_config = _Strict

    schemaVersion: Literal[2]
    mediaType: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifactType: Literal["application/vnd.finetune-vlm.adapter.v1"]
    config: _Descriptor
    layers: list[_Descriptor] = Field(min_length=2, max_length=66)
    annotations: dict[str, str] = {}


def push_to_oci(registry: AdapterRegistry, version: Version, ref: OciRef) -> OciRef:
    """Upload a version, every byte checked; existing blobs are not sent again.

    Args:
        registry: the registry that holds the version.
        version: the version to upload.
        ref: the repository to upload to; the tag is the version's number when none is given.

    Returns:
        The reference by digest, which never changes its meaning.

    Raises:
        ConflictError: the tag points to another artifact; nothing was changed. Or another client moved it meanwhile.
        IntegrityError: the version is damaged.
        StoreError: the OCI registry refused, or cannot be reached.
    """
    if ref.digest is not None:
        raise StoreError(
            f"the target of a push must not have a digest, which is known only afterwards, got {ref}. Give a tag, "
            "or none."
        )
    tag = ref.tag or str(version.version)
    with tempfile.TemporaryDirectory(prefix="finetune-mirror-") as work, OciRepository(ref) as repository:
        folder = registry.pull(version, Path(work, "adapter"))
        manifest = read_manifest(folder)[1]
        files = {path.name: manifest.files.get(path.name) or _entry_of(path) for path in sorted(folder.iterdir())}
        artifact = canonical_json(_artifact(version, manifest, files).model_dump())
        digest = sha256_hex(artifact)
        done = OciRef(host=ref.host, repository=ref.repository, digest=digest)
        there = repository.get_manifest(tag)
        if there is not None and there[0] != digest:
            raise ConflictError(
                f"{ref.host}/{ref.repository}:{tag} points to another artifact, sha256:{there[0]}. Nothing was "
                "changed. Choose another tag."
            )
        if there is None:
            for name, entry in files.items():
                if not repository.has_blob(entry):
                    repository.put_blob(entry, folder / name)
            repository.put_manifest(tag, artifact)
            _check_tag(repository, tag, digest)
    return done


def fetch_from_oci(ref: OciRef, into: str | Path) -> OciRef:
    """Download an artifact into an adapter folder, every byte checked.

    Only the digest proves who made the folder: give a digest, or compare the returned one with that of the publisher.

    Args:
        ref: the reference, with a tag or a digest.
        into: the folder to make, which appears whole or not at all.

    Returns:
        The reference by digest.

    Raises:
        NotFoundError: there is no such artifact.
        IntegrityError: the artifact is not an adapter, or its bytes do not match its digests.
        StoreError: the registry cannot be reached, or the folder cannot be written, or is not empty.
    """
    into = Path(into)
    reference = f"sha256:{ref.digest}" if ref.digest else ref.tag
    if reference is None:
        raise StoreError(f"the source of a fetch must have a tag or a digest, such as {ref}:17, got {ref}.")
    with OciRepository(ref) as repository, new_folder(into, elsewhere=_ELSEWHERE) as new:
        found = repository.get_manifest(reference)
        if found is None:
            raise NotFoundError(f"there is no artifact {ref}. Check the repository and the tag or digest.")
        digest, raw = found
        config, files = _read(raw, source=str(ref))
        manifest_raw = b"".join(repository.get_blob(config))
        manifest = AdapterManifest.parse(manifest_raw, source=f"{ref}, its config")
        listed = {**manifest.files, MANIFEST_NAME: config}
        if listed.items() - files.items() or any(
            entry.size > MAX_UNLISTED_BYTES for _, entry in files.items() - listed.items()
        ):
            raise IntegrityError(f"{ref}: its layers must be the files that the adapter's manifest lists, and are not")
        new.mkdir()
        for name, entry in files.items():
            with open(new / name, "xb") as file:
                for piece in [manifest_raw] if name == MANIFEST_NAME else repository.get_blob(entry):
                    file.write(piece)
        try:
            check_folder(new, manifest, besides=())
        except IntegrityError as error:
            raise IntegrityError(f"{ref}: {str(error).removeprefix(f'{new} ')}") from None
    return OciRef(host=ref.host, repository=ref.repository, digest=digest)


def _entry_of(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(sha256=sha256_hex(data), size=len(data))


def _artifact(version: Version, manifest: AdapterManifest, files: dict[str, FileEntry]) -> _Artifact:
    def describe(entry: FileEntry, kind: str, **annotations: str) -> _Descriptor:
        return _Descriptor(mediaType=kind, digest=f"sha256:{entry.sha256}", size=entry.size, annotations=annotations)

    licences = {"org.opencontainers.image.licenses": manifest.license} if manifest.license else {}
    return _Artifact(
        schemaVersion=2,
        mediaType="application/vnd.oci.image.manifest.v1+json",
        artifactType="application/vnd.finetune-vlm.adapter.v1",
        config=describe(files[MANIFEST_NAME], CONFIG_TYPE),
        layers=[describe(entry, LAYER_TYPE, **{TITLE: name}) for name, entry in files.items()],
        annotations={
            TITLE: version.full_name,
            "org.opencontainers.image.version": str(version.version),
            "org.opencontainers.image.created": manifest.created,
            "org.finetune-vlm.digest": f"sha256:{version.digest}",
            **licences,
        },
    )


def _read(raw: bytes, *, source: str) -> tuple[FileEntry, dict[str, FileEntry]]:
    """Return the entry of the adapter's manifest in an artifact, and its files by name."""
    document: Any = strict_json(raw, source=source, max_bytes=oci_client.MAX_MANIFEST_BYTES)
    try:
        artifact = _Artifact.model_validate(document)
    except ValidationError as error:
        raise IntegrityError(f"{source}: not an adapter of finetune-vlm: {first_problem(error)}") from None
    config = artifact.config.entry
    if artifact.config.mediaType != CONFIG_TYPE or config.size > MAX_MANIFEST_BYTES:
        raise IntegrityError(
            f"{source}: not an adapter of finetune-vlm: its config must be {CONFIG_TYPE} of at most "
            f"{MAX_MANIFEST_BYTES} bytes, got {artifact.config.mediaType} of {config.size} bytes"
        )
    titles = [layer.annotations.get(TITLE, "") for layer in artifact.layers]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise IntegrityError(f"{source}: the title of a layer must be unique, but {brief(twice[0])} is given twice")
    files = {title: layer.entry for title, layer in zip(titles, artifact.layers, strict=True)}
    if bad := [title for title in files if not is_key(title) or "/" in title]:
        raise IntegrityError(f"{source}: the title of a layer must be the name of a file, got {brief(bad[0])}")
    return config, files


def _check_tag(repository: OciRepository, tag: str, digest: str) -> None:
    there = repository.get_manifest(tag)
    if there is None or there[0] != digest:
        found = "nothing" if there is None else f"sha256:{there[0]}"
        raise ConflictError(
            f"another client moved {repository.ref.host}/{repository.ref.repository}:{tag} meanwhile, to {found}. "
            "Try again."
        )

"""Adapters with their history in one file, for machines without a network.

An archive is a plain tar of a registry's own keys: files and manifests, each before the entry of a log that names it.
Its last member is ``archive.json``, which holds the number and digest of the newest entry of each log. Equal histories
give equal bytes. An archive is not trusted: an import checks every digest and every chain, and that nothing is missing
or left over, before the first write. ``copy_adapter`` does all writes.
"""

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.adapters.manifest import Sha256, canonical_json, strict_json
from finetune.adapters.reference import AdapterRef, VersionNumber
from finetune.core.regular_file import NotRegularError, open_regular
from finetune.core.system_errors import explain
from finetune.errors import AdapterError, IntegrityError, StoreError
from finetune.registry.log.commits import Commit, first_problem, log_key
from finetune.registry.storage.blobs import blob_key, read_blob
from finetune.registry.storage.location import refuse_in_registry
from finetune.registry.storage.store import ObjectMissing, Store, read_all
from finetune.registry.transfer.copying import blobs_of, check_has, read_history
from finetune.registry.transfer.tars import TarStore, TarWriter

ABOUT_KEY = "archive.json"
MAX_ABOUT_BYTES = 256 * 1024**2  # for more than a million names
_ELSEWHERE = " (--to)"


class _Head(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    seq: VersionNumber
    digest: Sha256


class _About(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    heads: dict[str, _Head] = Field(min_length=1)  # name -> newest entry

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump())


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An archive that was written.

    Attributes:
        path: the file.
        names: the adapters in it.
        entries: the number of entries of their logs.
        bytes: the size of the file, in bytes.
        sha256: the SHA-256 of the file, to compare after its transport.
    """

    path: str
    names: list[str]
    entries: int
    bytes: int
    sha256: str


def export_archive(source: Store, names: Iterable[str], path: str | Path) -> Exported:
    """Write adapters with their whole history into one file, every byte checked on the way.

    Args:
        source: the store of the registry.
        names: the adapters, ``ns/name``.
        path: the file to make; it appears whole or not at all.

    Raises:
        NotFoundError: the registry has no such adapter.
        IntegrityError: the registry is damaged.
        StoreError: the registry cannot be read, or the file cannot be written, exists, or would lie in a registry.
    """
    path = Path(path)
    refuse_in_registry(path, elsewhere=_ELSEWHERE)
    refs = sorted({AdapterRef.parse_name(name).full_name: AdapterRef.parse_name(name) for name in names}.items())
    aside = path.with_name(f".{path.name[:100]}-{uuid.uuid4().hex}")
    try:
        if path.exists() or path.is_symlink():
            raise StoreError(f"{path} exists already. Remove it, or choose another name{_ELSEWHERE}.")
        with open(aside, "xb") as file:
            tar = TarWriter(file)
            heads = _write(tar, source, [ref for _, ref in refs])
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except StoreError:  # an OSError too, and already explained
        raise
    except OSError as error:
        raise explain(error, path, verb="write", elsewhere=_ELSEWHERE) from error
    finally:
        with suppress(OSError):
            os.unlink(aside)
    return Exported(
        path=str(path),
        names=[*heads],
        entries=sum(head.seq for head in heads.values()),
        bytes=tar.size,
        sha256=tar.sha256.hexdigest(),
    )


@contextmanager
def open_archive(path: str | Path) -> Iterator[Store]:
    """Open an archive, checked as a whole, as a store from which ``copy_adapter`` copies.

    Raises:
        IntegrityError: the file is not exactly as ``export_archive`` writes it.
        StoreError: the file cannot be read.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            store = TarStore(file, path)
            try:
                _check(store)
            except (AdapterError, ObjectMissing) as error:
                raise IntegrityError(f"{path}: {error}") from None
            yield store
    except StoreError:  # an OSError too, and already explained
        raise
    except NotRegularError as error:
        what = f"{path}: {error.strerror}"
        raise StoreError(f"{what}. Give a file that `finetune registry export-archive` wrote.") from None
    except OSError as error:
        raise explain(error, path, verb="read") from error


def _write(tar: TarWriter, source: Store, refs: list[AdapterRef]) -> dict[str, _Head]:
    heads: dict[str, _Head] = {}
    written: set[str] = set()
    for ref in refs:
        check_has(source, ref)
        for commit in read_history(source, ref):
            for entry in blobs_of(source, ref, commit):
                if entry.sha256 not in written:
                    written.add(entry.sha256)
                    tar.add(blob_key(entry.sha256), entry.size, read_blob(source, entry))
            raw = commit.to_bytes()
            tar.add(_key(ref, commit), len(raw), [raw])
            heads[ref.full_name] = _Head(seq=commit.seq, digest=commit.digest)
    raw = _About(heads=heads).to_bytes()
    tar.add(ABOUT_KEY, len(raw), [raw])
    tar.finish()
    return heads


def _key(ref: AdapterRef, commit: Commit) -> str:
    return log_key(ref.namespace, ref.name, commit.seq)


def _check(store: TarStore) -> None:
    """Read the whole archive: it must hold exactly the objects that its logs name, with the right bytes."""
    named = {ABOUT_KEY}
    for name, listed in _read_about(store).heads.items():
        ref = AdapterRef.parse_name(name)
        head = None
        for head in read_history(store, ref):
            named.add(_key(ref, head))
            for entry in blobs_of(store, ref, head):
                if store.head(blob_key(entry.sha256)).size != entry.size:
                    raise IntegrityError(f"{blob_key(entry.sha256)}: must have {entry.size} bytes, got another size")
                if blob_key(entry.sha256) not in named:
                    named.add(blob_key(entry.sha256))
                    for _ in read_blob(store, entry):
                        pass
        if head is None or (head.seq, head.digest) != (listed.seq, listed.digest):
            raise IntegrityError(
                f"the log of {name} must end with the entry {listed.seq} that {ABOUT_KEY} names, and does not"
            )
    if extra := sorted(meta.key for meta in store.list() if meta.key not in named):
        raise IntegrityError(f"it also holds {', '.join(extra[:3])}, which no entry in it names")


def _read_about(store: TarStore) -> _About:
    raw = read_all(store, ABOUT_KEY, max_bytes=MAX_ABOUT_BYTES)
    about = strict_json(raw, source=ABOUT_KEY, max_bytes=MAX_ABOUT_BYTES)
    try:
        parsed = _About.model_validate(about)
    except ValidationError as error:
        raise IntegrityError(f"{ABOUT_KEY}: {first_problem(error)}") from None
    if parsed.to_bytes() != raw:
        raise IntegrityError(f"{ABOUT_KEY}: not in the canonical form that export-archive writes")
    return parsed

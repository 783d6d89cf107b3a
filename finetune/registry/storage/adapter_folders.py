"""Adapter folders on the disk: checked against their manifest when they are read, and written whole.

Every byte is hashed while it is copied, so that a file that changes meanwhile is never stored under a wrong digest.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Container, Iterable, Iterator
from functools import partial
from pathlib import Path

from finetune.adapters.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    AdapterManifest,
    FileEntry,
    sha256_hex,
)
from finetune.core.regular_file import NotRegularError, open_regular
from finetune.core.system_errors import explain
from finetune.errors import AdapterError, IntegrityError, ManifestError, StoreError, TrustError
from finetune.registry.storage.blobs import blob_key, checked, put_blobs, read_blob
from finetune.registry.storage.store import Store, chunks, exists, read_all
from finetune.registry.trust.signing import MAX_SIGNATURE_BYTES, check_signature

# The files of a downloaded repository of the Hugging Face Hub besides the adapter: its card, and the hub's own.
HUB_FILES = frozenset({"README.md", ".gitattributes", ".cache"})
_ELSEWHERE = " (--into or FINETUNE_CACHE)"
_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


def read_file(path: Path, entry: FileEntry) -> Iterator[bytes]:
    """Yield the bytes of a file, checked.

    Raises:
        IntegrityError: the bytes are not those of ``entry``.
        StoreError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            yield from checked(chunks(file), entry, what=str(path))
    except OSError as error:
        raise explain(error, path, verb="read") from error


def read_manifest(folder: Path) -> tuple[bytes, AdapterManifest]:
    """Return the manifest of an adapter folder, as bytes and parsed.

    Raises:
        ManifestError: the manifest is missing, or breaks its schema.
    """
    path = folder / MANIFEST_NAME
    try:
        if path.is_symlink():
            raise ManifestError(f"{path} must be a regular file, got a symbolic link. Put the file itself there.")
        with open_regular(path) as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        finished = (folder / "adapter" / MANIFEST_NAME).is_file()
        hint = (
            f"The adapter of this run is {folder / 'adapter'}." if finished else "A finished training run writes one."
        )
        raise ManifestError(f"{folder} is not an adapter folder: it has no {MANIFEST_NAME}. {hint}") from None
    except NotRegularError as error:
        raise ManifestError(f"{path}: {error.strerror}. Replace it by the file itself.") from None
    except OSError as error:
        raise explain(error, path, verb="read") from error
    return raw, AdapterManifest.parse(raw, source=str(path))


def check_folder(folder: Path, manifest: AdapterManifest, *, besides: Container[str] = HUB_FILES) -> None:
    """Check that a folder holds the files that its manifest lists, byte for byte, and nothing but its signature.

    Args:
        folder: the folder.
        manifest: its manifest.
        besides: the names of files that may be there without being part of the adapter; they are not read.

    Raises:
        IntegrityError: a file is missing, is not listed, is not a plain file, or has other bytes.
    """
    try:
        with os.scandir(folder) as entries:
            plain = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    except OSError as error:
        raise explain(error, folder, verb="read") from error
    allowed = {*manifest.files, MANIFEST_NAME}
    plain = {name: is_plain for name, is_plain in plain.items() if name in allowed or name not in besides}
    if missing := _quoted(allowed - plain.keys()):
        raise IntegrityError(f"{folder} lacks {missing}, which its manifest lists. Pull it again, or save it again.")
    if extra := _quoted(plain.keys() - allowed - {SIGNATURE_NAME}):
        raise IntegrityError(
            f"{folder} also holds {extra}, which its manifest does not list. Remove it, or save the adapter again."
        )
    if others := _quoted(name for name, is_plain in plain.items() if not is_plain):
        raise IntegrityError(f"{folder}: {others} must be a plain file, not a link, a folder, a FIFO or a device")
    for name, entry in manifest.files.items():
        for _ in read_file(folder / name, entry):
            pass


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def holds(folder: Path, digest: str) -> bool:
    """Return whether a folder holds, byte for byte, the adapter whose manifest has this SHA-256."""
    try:
        raw, manifest = read_manifest(folder)
        if sha256_hex(raw) != digest:
            return False
        check_folder(folder, manifest, besides=())
    except (AdapterError, StoreError):
        return False
    return True


def keep_signature(folder: Path, signature: str | None) -> None:
    """Write the signature beside the manifest, for users who get the folder without the registry.

    Raises:
        StoreError: the signature cannot be written.
    """
    if signature is None:
        return
    path, data = folder / SIGNATURE_NAME, f"{signature}\n".encode()
    try:
        if not path.is_symlink() and path.is_file() and path.read_bytes() == data:
            return
        # Outside the folder at first, because another process may be checking the folder at this moment.
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as work:
            _write(Path(work, SIGNATURE_NAME), [data])
            os.replace(Path(work, SIGNATURE_NAME), path)
    except OSError as error:
        raise explain(error, path, verb="write", elsewhere=_ELSEWHERE) from error


def read_signature(folder: Path) -> str | None:
    """Return the signature beside a manifest; None when there is none.

    Raises:
        TrustError: the file does not hold a signature.
    """
    path = folder / SIGNATURE_NAME
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_SIGNATURE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain(error, path, verb="read") from error
    try:
        return check_signature(raw.decode().removesuffix("\n"))
    except ValueError as error:
        raise TrustError(f"{path}: {error}") from None


def put_folder(store: Store, folder: Path, raw: bytes, manifest: AdapterManifest) -> None:
    """Store the files of an adapter folder, and last the bytes of its manifest, so that an entry may name them.

    Raises:
        ConflictError: gc is deleting one of the blobs.
        IntegrityError: a file was changed meanwhile.
        StoreError: the store cannot be written.
    """
    put_blobs(
        store,
        [
            *((entry, partial(read_file, folder / name, entry)) for name, entry in manifest.files.items()),
            (_entry_of(raw), lambda: raw),
        ],
    )


def has_folder(store: Store, raw: bytes, manifest: AdapterManifest) -> bool:
    """Return whether a store has the files of an adapter and its manifest, by their keys alone."""
    return all(exists(store, blob_key(entry.sha256)) for entry in (*manifest.files.values(), _entry_of(raw)))


def _entry_of(raw: bytes) -> FileEntry:
    return FileEntry(sha256=sha256_hex(raw), size=len(raw))


def load_manifest(store: Store, digest: str, full_name: str) -> tuple[bytes, AdapterManifest]:
    """Return a published manifest, checked, as bytes and parsed.

    Raises:
        IntegrityError: the manifest is damaged, or belongs to an adapter of another name.
    """
    key = blob_key(digest)
    raw = read_all(store, key, max_bytes=MAX_MANIFEST_BYTES)
    if sha256_hex(raw) != digest:
        raise IntegrityError(f"{key}: its sha256 is {sha256_hex(raw)}, but must be the one in its name")
    manifest = AdapterManifest.parse(raw, source=key)
    if manifest.full_name != full_name:
        raise IntegrityError(
            f"{key}: must be a manifest of {full_name}, whose log names it, got one of {manifest.full_name}"
        )
    return raw, manifest


def build_folder(store: Store, digest: str, full_name: str, target: Path, *, replace: bool) -> None:
    """Copy a published adapter into ``target``, which appears whole or not at all.

    Args:
        store: the store that holds its bytes.
        digest: the SHA-256 of its manifest.
        full_name: the name under which it was published.
        target: the folder to make; missing parents are made too.
        replace: True to delete an existing file or folder at ``target``.

    Raises:
        IntegrityError: the bytes of a blob do not match its digest.
        StoreError: the folder cannot be written, or exists with other contents and must not be replaced.
    """
    work: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".pull-", dir=target.parent))
        new = work / "new"
        new.mkdir()
        raw, manifest = load_manifest(store, digest, full_name)
        _write(new / MANIFEST_NAME, [raw])
        for name, entry in manifest.files.items():
            _write(new / name, read_blob(store, entry))
        _put_in_place(new, target, digest, trash=work if replace else None)
    except StoreError:  # an OSError too, and already explained
        raise
    except OSError as error:
        raise explain(error, target, verb="write", elsewhere=_ELSEWHERE) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    with open(path, "xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(new: Path, target: Path, digest: str, *, trash: Path | None) -> None:
    while True:
        try:
            os.rename(new, target)
            return
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        if holds(target, digest):  # another process was faster
            return
        if trash is None:
            raise StoreError(f"{target} holds something else already. Choose a folder that does not exist yet.")
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, trash / uuid.uuid4().hex)

"""A store in a bucket of S3, Google Cloud Storage or Azure, or of a server with the API of one of them."""

import contextlib
import io
import itertools
import os
import random
import re
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, S3Store

from finetune.errors import FinetuneError, StoreError
from finetune.registry.storage.store import (
    CHUNK_BYTES,
    AlreadyExists,
    ObjectMeta,
    ObjectMissing,
    check_key,
    exists,
    is_key,
)

if TYPE_CHECKING:
    from obstore.store import RetryConfig

PART_BYTES = 8 << 20  # of an upload in parts; a bucket takes 10,000 parts
PARTS_AT_ONCE = 4
CREATE_ATTEMPTS = 6
FIRST_PAUSE = 0.05  # seconds; doubled at each conflict

# Weights may be gigabytes on a slow line, so a long transfer is fine as long as bytes arrive. These are given as
# configuration, because client options would replace those of the environment.
_TIMEOUTS = {"timeout": "2h", "read_timeout": "2m", "connect_timeout": "10s"}
_RETRY: "RetryConfig" = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
}

# By the scheme of the URL: obstore's class, its configuration, and the variables of credentials and endpoint.
_KINDS: dict[str, tuple[Any, dict[str, str], str, str]] = {
    # Set here, because AWS_CONDITIONAL_PUT=disabled in the environment would make a create overwrite.
    "s3": (
        S3Store,
        _TIMEOUTS | {"conditional_put": "etag"},
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT, AWS_REGION; AWS_ALLOW_HTTP=true for http://",
    ),
    "gs": (
        GCSStore,
        _TIMEOUTS,
        "GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_BASE_URL; GOOGLE_ALLOW_HTTP=true for http://",
    ),
    "az": (
        AzureStore,
        _TIMEOUTS,
        "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_ENDPOINT; AZURE_ALLOW_HTTP=true for http://",
    ),
}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist")
_NO_CREDENTIALS = re.compile(r"169\.254\.169\.254|metadata\.google|must be specified|Missing(Account|Credential)")

_used_by: int | None = None  # id of the process that has used obstore


class ObjectStore:
    """A store below a prefix of a bucket. Credentials and endpoint come from the environment, as obstore reads them.

    A single request creates an object only where there is none (``If-None-Match``, or generation 0). An upload in parts
    cannot have that condition, so ``mode="create"`` holds an object whole in memory. Put large objects with
    ``mode="overwrite"``, under keys that depend on their contents.

    Do not use it in a process that was forked from one that had used it: a fork does not copy obstore's threads.
    """

    def __init__(self, location: str) -> None:
        """Open a bucket; no request is sent yet.

        Args:
            location: ``s3://bucket/prefix``, or the same with ``gs://`` or ``az://``; the prefix is optional.

        Raises:
            StoreError: the URL is not valid, or the environment lacks settings that obstore needs.
        """
        scheme, _, path = location.partition("://")
        bucket, _, prefix = path.strip("/").partition("/")
        if scheme not in _KINDS or not _BUCKET.fullmatch(bucket) or (prefix and not is_key(prefix)):
            raise StoreError(
                f"the location of a registry must be {scheme}://bucket or {scheme}://bucket/team/registry, with parts "
                f"of a-z, A-Z, 0-9, '.', '_' and '-'; got {location!r}."
            )
        self.location = location
        self._bucket_name = bucket
        kind, config, self._credentials, self._endpoint = _KINDS[scheme]
        with self._explained("open", ""):
            self._bucket = kind(bucket, prefix=prefix or None, config=config, retry_config=_RETRY)

    def put(self, key: str, data: bytes | Iterable[bytes], *, mode: Literal["create", "overwrite"] = "create") -> None:
        """Write an object; with ``mode="create"`` all of it is held in memory."""
        check_key(key)
        if mode == "create":
            self._create(key, data if isinstance(data, bytes) else b"".join(data))
            return
        body = data if isinstance(data, bytes) else _first_part(iter(data))
        with self._explained("write", key):
            obstore.put(self._bucket, key, body, mode="overwrite", chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

    def _create(self, key: str, data: bytes) -> None:
        for attempt in range(CREATE_ATTEMPTS):
            with self._explained("write", key), contextlib.suppress(AlreadyExistsError, PreconditionError):
                obstore.put(self._bucket, key, data, mode="create")
                return
            # obstore raises the same error for a 409, with which S3 asks to try again: another write of the key was
            # under way, and may have failed.
            if exists(self, key):
                raise AlreadyExists(f"{key} exists already in {self.location}")
            time.sleep(random.uniform(0, FIRST_PAUSE * 2**attempt))
        raise StoreError(
            f"cannot write {key} in {self.location}: {CREATE_ATTEMPTS} times the bucket answered that another write "
            "of it is under way, but the object did not appear. Try again later."
        )

    def get(self, key: str) -> BinaryIO:
        """Open an object for reading, with one request; its bytes are fetched as they are read."""
        check_key(key)
        with self._explained("read", key):
            found = obstore.get(self._bucket, key)
        return io.BufferedReader(_Body(self, key, iter(found.stream(min_chunk_size=CHUNK_BYTES))), CHUNK_BYTES)

    def head(self, key: str) -> ObjectMeta:
        """Return size and time of an object."""
        check_key(key)
        with self._explained("read", key):
            found = obstore.head(self._bucket, key)
        return ObjectMeta(key=key, size=found["size"], modified=found["last_modified"])

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """Yield every object below ``prefix``; a request for each 1,000 of them, or 5,000 with Azure."""
        start = check_key(prefix.rstrip("/")) if prefix else None
        with self._explained("list", prefix):
            for found in itertools.chain.from_iterable(obstore.list(self._bucket, prefix=start, chunk_size=1000)):
                if is_key(found["path"]):
                    yield ObjectMeta(key=found["path"], size=found["size"], modified=found["last_modified"])

    def delete(self, key: str) -> None:
        """Remove an object."""
        check_key(key)
        with contextlib.suppress(ObjectMissing), self._explained("delete", key):
            obstore.delete(self._bucket, key)

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        """Turn obstore's errors into ours."""
        _refuse_forked()
        try:
            yield
        except FinetuneError:  # raised by the iterator over the data
            raise
        except (BaseError, OSError) as error:
            text = str(error)
            if isinstance(error, FileNotFoundError) and verb in ("read", "delete") and not _NO_BUCKET.search(text):
                raise ObjectMissing(f"{key} is not there in {self.location}") from None
            what = f"{key} in {self.location}" if key else self.location
            raise StoreError(f"cannot {verb} {what}: {_in_short(error)}. {self._advice(error, text)}") from error

    def _advice(self, error: Exception, text: str) -> str:
        # By the text too, because obstore has no own classes for the errors of a listing.
        if isinstance(error, FileNotFoundError) or _NO_BUCKET.search(text):
            return f"Create the bucket {self._bucket_name!r}, or correct its name (--registry or FINETUNE_REGISTRY)."
        if isinstance(error, UnauthenticatedError) or _NO_CREDENTIALS.search(text):
            return f"Give your credentials: set {self._credentials}."
        if isinstance(error, PermissionDeniedError) or "403 Forbidden" in text:
            return (
                f"Check {self._credentials}, and that they may read, write, list and delete in the bucket "
                f"{self._bucket_name!r}."
            )
        return f"Check the network and the endpoint ({self._endpoint}), then try again."


class _Body(io.RawIOBase):
    """A file of the bytes of an object as they arrive."""

    def __init__(self, store: ObjectStore, key: str, pieces: Iterator[bytes]) -> None:
        self._store, self._key, self._pieces = store, key, pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        if not self._left:
            with self._store._explained("read", self._key):
                # Without empty pieces, because an empty read means the end of the file.
                self._left = memoryview(next(filter(None, self._pieces), b""))
        size = min(len(into), len(self._left))
        into[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def _first_part(pieces: Iterator[bytes]) -> bytes | Iterator[bytes]:
    """Return bytes when they fit into one request, else an iterator: an upload in parts needs three or more."""
    first, size = [], 0
    for piece in pieces:
        first.append(piece)
        size += len(piece)
        if size > PART_BYTES:
            return itertools.chain(first, pieces)
    return b"".join(first)


def _in_short(error: Exception) -> str:
    """Return the message of the server, or else of obstore, without debug output and the signature of a URL."""
    text = " ".join(str(error).partition("\n\nDebug source:")[0].split())
    status, _, body = text.partition("status code: ")[2].partition(": ")
    details = [re.search(f"<{name}>([^<]*?)(?: RequestId:|<)", body) for name in ("Code", "Message")]
    answer = ": ".join([status, *(match[1] for match in details if match)])
    return (answer if status else re.sub(r"\?\S+", "?...", text)).rstrip(".: ")


def _refuse_forked() -> None:
    global _used_by
    _used_by = _used_by or os.getpid()
    if _used_by != os.getpid():
        raise StoreError(
            "this process was forked from one that has used an object store, and would wait forever. Start it with "
            "multiprocessing's 'spawn' instead of 'fork', or open the registry in the child processes only."
        )

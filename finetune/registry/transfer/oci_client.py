"""A client for a repository of an OCI registry, after the distribution specification.

Source: https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md. The client sends only the requests for
a push and a pull of whole blobs. Requests to loopback use plain HTTP, all others HTTPS.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from finetune.adapters.manifest import FileEntry, sha256_hex
from finetune.errors import IntegrityError, NotFoundError, StoreError
from finetune.registry.storage.adapter_folders import read_file
from finetune.registry.storage.blobs import checked
from finetune.registry.storage.store import CHUNK_BYTES
from finetune.registry.transfer.oci_login import LOOPBACK, answer_challenge

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
MAX_MANIFEST_BYTES = 4 * 1024**2  # by the specification, registries must accept this size
TIMEOUT = 60.0  # seconds, for each answer and each part of it

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REF = re.compile(
    rf"(?P<host>[A-Za-z0-9.-]+(?::\d{{1,5}})?|\[::1\](?::\d{{1,5}})?)/(?P<repository>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@sha256:(?P<digest>[0-9a-f]{64}))?"
)


@dataclass(frozen=True, kw_only=True)
class OciRef:
    """The reference to an artifact.

    Attributes:
        host: the host of the registry, with the port unless it is the default port.
        repository: the path of the repository on the host.
        tag: the tag, which may move; None for none.
        digest: the SHA-256 of the artifact's manifest; None for none.
    """

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> "OciRef":
        """Read ``HOST/REPOSITORY``, followed by ``:TAG``, ``@sha256:DIGEST`` or nothing.

        Raises:
            StoreError: the text is not such a reference.
        """
        match = _REF.fullmatch(text)
        # As in other clients, a name with neither a dot nor a port is a host only when it is localhost.
        if match is None or not ({".", ":"} & set(match["host"]) or match["host"] == "localhost"):
            raise StoreError(
                "a reference to an OCI registry must be HOST/REPOSITORY, HOST/REPOSITORY:TAG or "
                f"HOST/REPOSITORY@sha256:DIGEST, such as localhost:5000/medical/brain-mri:17; got {text!r}"
            )
        return cls(**match.groupdict())

    def at(self, digest: str) -> str:
        """Return the reference by digest, which never changes its meaning."""
        return f"{self.host}/{self.repository}@sha256:{digest}"

    def __str__(self) -> str:
        if self.digest is not None:
            return self.at(self.digest)
        return f"{self.host}/{self.repository}" + (f":{self.tag}" if self.tag else "")


class OciRepository:
    """A client of one repository; it keeps a connection open, so use it with ``with``."""

    def __init__(self, ref: OciRef) -> None:
        self.ref = ref
        scheme = "http" if LOOPBACK.fullmatch(ref.host) else "https"
        self._base = f"{scheme}://{ref.host}/v2/{ref.repository}"
        self._client = httpx2.Client(timeout=TIMEOUT, follow_redirects=True)
        self._authorization: str | None = None

    def __enter__(self) -> "OciRepository":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def get_manifest(self, reference: str) -> tuple[str, bytes] | None:
        """Return SHA-256 and bytes of the manifest at a tag or ``sha256:...``; None when there is none.

        Raises:
            IntegrityError: the answer is larger than 4 MiB, or does not have the digest.
        """
        headers = {"Accept": MANIFEST_TYPE}
        with self._asked("GET", f"/manifests/{reference}", headers=headers, missing_ok=True) as answer:
            if answer.status_code == 404:
                return None
            raw = b"".join(_at_most(answer.iter_bytes(CHUNK_BYTES), MAX_MANIFEST_BYTES, what=f"{self.ref}"))
        digest = sha256_hex(raw)
        if reference.startswith("sha256:") and reference != f"sha256:{digest}":
            raise IntegrityError(
                f"{self.ref}: the registry must send the manifest with {reference}, but sent one with sha256:{digest}"
            )
        return digest, raw

    def put_manifest(self, reference: str, raw: bytes) -> None:
        """Write a manifest; an existing tag moves to it."""
        with self._asked("PUT", f"/manifests/{reference}", body=raw, headers={"Content-Type": MANIFEST_TYPE}):
            pass

    def has_blob(self, entry: FileEntry) -> bool:
        """Return whether a blob of this digest and size exists."""
        with self._asked("HEAD", f"/blobs/sha256:{entry.sha256}", missing_ok=True) as answer:
            return answer.status_code == 200 and answer.headers.get("Content-Length") == str(entry.size)

    def put_blob(self, entry: FileEntry, path: Path) -> None:
        """Upload a file as a blob, in one piece; both this client and the registry check it.

        Raises:
            IntegrityError: the file does not have this digest and size.
        """
        with self._asked("POST", "/blobs/uploads/", body=b"") as answer:
            place = answer.headers.get("Location")
        if not place:
            raise StoreError(f"{self.ref.host}: its answer to an upload must have the header Location, and has none")
        url = httpx2.URL(self._base).join(place).copy_add_param("digest", f"sha256:{entry.sha256}")
        headers = {"Content-Length": str(entry.size), "Content-Type": "application/octet-stream"}
        with self._asked("PUT", url, body=(path, entry), headers=headers):
            pass

    def get_blob(self, entry: FileEntry) -> Iterator[bytes]:
        """Yield the bytes of a blob, checked.

        Raises:
            NotFoundError: the blob does not exist.
            IntegrityError: the blob does not have this digest and size.
        """
        with self._asked("GET", f"/blobs/sha256:{entry.sha256}") as answer:
            what = f"{self.ref.host}/{self.ref.repository}@sha256:{entry.sha256}"
            yield from checked(answer.iter_raw(CHUNK_BYTES), entry, what=what)

    @contextmanager
    def _asked(
        self,
        method: str,
        where: str | httpx2.URL,
        *,
        body: bytes | tuple[Path, FileEntry] | None = None,
        headers: dict[str, str] | None = None,
        missing_ok: bool = False,
    ) -> Iterator[httpx2.Response]:
        """Send a request, again with a password or token if the registry requires one; yield a successful answer."""
        url = httpx2.URL(self._base + where) if isinstance(where, str) else where
        try:
            answer = self._send(method, url, body, headers or {})
            if answer.status_code == 401 and url.netloc.decode() == self.ref.host:
                answer.close()
                challenge = answer.headers.get("WWW-Authenticate", "")
                self._authorization = answer_challenge(self._client, self.ref.host, challenge)
                answer = self._send(method, url, body, headers or {})
            try:
                if not (answer.is_success or (missing_ok and answer.status_code == 404)):
                    raise self._refused(answer)
                yield answer
            finally:
                answer.close()
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise StoreError(
                f"cannot reach {self.ref.host}: {reason}. Check the name, and that the registry is running."
            ) from error

    def _send(
        self, method: str, url: httpx2.URL, body: bytes | tuple[Path, FileEntry] | None, headers: dict[str, str]
    ) -> httpx2.Response:
        headers = {"Accept-Encoding": "identity", **headers}
        # An upload may go to another host; the URL for it authorizes us, so it must not get the password.
        if self._authorization is not None and url.netloc.decode() == self.ref.host:
            headers["Authorization"] = self._authorization
        content = read_file(*body) if isinstance(body, tuple) else body
        return self._client.send(self._client.build_request(method, url, content=content, headers=headers), stream=True)

    def _refused(self, answer: httpx2.Response) -> Exception:
        message = f"{answer.status_code} {answer.reason_phrase}"
        try:
            body = b"".join(_at_most(answer.iter_bytes(), 65536, what="an error"))
            message += "".join(f"; {each['code']}: {each.get('message', '')}" for each in json.loads(body)["errors"])
        except (ValueError, KeyError, TypeError, IntegrityError):
            pass  # a proxy in between may answer in another form than the specification
        if answer.status_code == 404:
            return NotFoundError(f"{self.ref}: {message}")
        advice = f" Log in with `docker login {self.ref.host}`." if answer.status_code in (401, 403) else ""
        return StoreError(f"{self.ref}: the registry refused: {message}.{advice}")


def _at_most(pieces: Iterable[bytes], limit: int, *, what: str) -> Iterator[bytes]:
    seen = 0
    for piece in pieces:
        seen += len(piece)
        if seen > limit:
            raise IntegrityError(f"{what}: the registry must send at most {limit} bytes, and sent more")
        yield piece

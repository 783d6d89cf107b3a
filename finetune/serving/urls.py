"""Fetching of images from untrusted URLs: from public addresses only, with limits on size and time.

A URL may come from a user who wants this process to reach places that only it can reach. So each
connection checks the addresses of its host, and uses a checked address. A name that resolves to another address a
moment later changes nothing. The same applies to every redirect.
"""

from __future__ import annotations

import base64
import binascii
import re
import socket
import time
from dataclasses import dataclass, field
from functools import cache
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore2

from finetune.errors import FetchError, brief, plain
from finetune.serving.addresses import as_address, is_allowed

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator
    from ipaddress import IPv4Network, IPv6Network

# The allowed media types, with the first bytes of their files.
TYPES = {
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
}
_ALLOWED = f"one of {', '.join(TYPES)}"
_LONGEST = 8192  # characters of an http(s) URL
_REDIRECTS = (301, 302, 303, 307, 308)
_DATA = re.compile(r"data:(?P<type>[^;,]*)(?P<more>(?:;[^;,]*)*?)(?P<base64>;base64)?,", re.IGNORECASE)


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, as the operating system resolves them.

    Raises:
        OSError: the host has no address.
    """
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True, kw_only=True)
class UrlPolicy:
    """The URLs that may be fetched, and the bounds of each fetch.

    Attributes:
        max_bytes: the limit, in bytes, for the file of an image.
        timeout: the limit, in seconds, for one image in all, redirects and name lookups included.
        max_redirects: the maximum number of redirects that are followed.
        allow_private: the private networks that may be reached, such as that of an app's own image store.
        resolve: the function that returns the addresses of a host and port; it raises OSError if there are none.
    """

    max_bytes: int = 20 * 1024 * 1024
    timeout: float = 10.0
    max_redirects: int = 3
    allow_private: tuple[IPv4Network | IPv6Network, ...] = ()
    resolve: Callable[[str, int], list[str]] = field(default=resolve, repr=False)


def is_url(text: str) -> bool:
    """Return True if a text is a URL and not a path: it begins with ``data:`` or a scheme and ``://``."""
    return re.match(r"data:|https?:|[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def fetch_image(url: str, policy: UrlPolicy) -> bytes:
    """Return the file of the image at a URL: http, https, or data in base64.

    The function reads no other URL, and no file of this machine. It does not use the proxies of the environment,
    because a proxy would resolve names itself.

    Args:
        url: the URL, which is not trusted.
        policy: the URLs that may be fetched, and the bounds of a fetch.

    Raises:
        FetchError: the URL is not allowed, cannot be fetched, or is not an image of ``TYPES``.
    """
    if url[:5].lower() == "data:":
        return _of_data(url, policy)
    deadline = time.monotonic() + policy.timeout
    for _ in range(policy.max_redirects + 1):
        found = _request(_parse(url), policy, deadline)
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(url, found)
        except ValueError:
            raise FetchError(f"{_show(url)}: the target of its redirect must be a URL, got {brief(found)}") from None
    raise FetchError(f"{_show(url)}: it may redirect at most {policy.max_redirects} times. Give the final URL.")


def _of_data(url: str, policy: UrlPolicy) -> bytes:
    head = _DATA.match(url[:1024])
    if head is None or not head["base64"]:
        raise FetchError(f"{brief(url, 60)}: a data URL of an image must have the form data:image/png;base64,...")
    _require_type(head["type"], where="data URL")
    if len(url) - head.end() > (policy.max_bytes + 2) // 3 * 4:
        raise FetchError(f"data URL: an image may have at most {policy.max_bytes} bytes, got more. Make it smaller.")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise FetchError(f"data URL: the data after the comma is not base64: {error}") from None
    if len(data) > policy.max_bytes:
        raise FetchError(
            f"data URL: an image may have at most {policy.max_bytes} bytes, got {len(data)}. Make it smaller."
        )
    return _checked(data, where="data URL")


def _parse(url: str) -> SplitResult:
    """Return the parts of an http(s) URL that every parser reads in the same way.

    Raises:
        FetchError: parsers may differ, or the URL is not allowed.
    """
    if len(url) > _LONGEST or not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise FetchError(
            f"{_show(url)}: a URL must have at most {_LONGEST} visible ASCII characters and no backslash. Write other "
            "letters of a path as %XX, and those of a host as xn--..."
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchError(f"{_show(url)}: not a URL: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise FetchError(f"{_show(url)}: the scheme must be http or https, got {brief(parts.scheme, 20)}")
    if "@" in parts.netloc:
        raise FetchError(f"{_show(url)}: a URL must not contain a user name or password. Remove it.")
    host = parts.hostname or ""
    last = host.rstrip(".").rpartition(".")[2]
    looks_numeric = ":" in host or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last)
    if not host or port == 0 or (looks_numeric and as_address(host) is None):
        raise FetchError(
            f"{_show(url)}: {brief(host)} is not a host. Write an address as four decimal numbers or as IPv6 in []."
        )
    if not looks_numeric and not re.fullmatch(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", host):
        raise FetchError(f"{_show(url)}: {brief(host)} is not a host. Check its spelling.")
    return parts


def _request(url: SplitResult, policy: UrlPolicy, deadline: float) -> bytes | str:
    """Return the image's file, or the URL to which the answer redirects."""
    where = _show(url.geturl())
    target = httpcore2.URL(
        scheme=url.scheme.encode(),
        host=(url.hostname or "").encode(),
        port=url.port,
        target=((url.path or "/") + (f"?{url.query}" if url.query else "")).encode(),
    )
    headers = {"Host": url.netloc, "Accept": ", ".join(TYPES), "Accept-Encoding": "identity", "Connection": "close"}
    backend = _Checked(policy, deadline, where)
    try:
        with (
            httpcore2.ConnectionPool(ssl_context=_tls(), network_backend=backend) as pool,
            pool.stream("GET", target, headers=list(headers.items())) as response,
        ):
            fields = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and "location" in fields:
                return fields["location"]
            if response.status != 200:
                raise FetchError(f"{where}: the server must answer with status 200, got {response.status}")
            _require_type(fields.get("content-type", "").partition(";")[0], where=where)
            if (coding := fields.get("content-encoding", "identity").strip().lower()) != "identity":
                raise FetchError(f"{where}: Content-Encoding must be identity, got {brief(coding, 30)}")
            announced = int(fields.get("content-length", "0"))  # h11 has checked that it is a number
            return _read(response.iter_stream(), announced, policy.max_bytes, where)
    except httpcore2.TimeoutException:
        raise FetchError(f"{where}: the fetch took more than {policy.timeout:g} seconds") from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError, UnicodeError) as error:
        raise FetchError(f"{where}: the image cannot be fetched: {brief(str(error) or type(error).__name__)}") from None


def _read(pieces: Iterator[bytes], announced: int, most: int, where: str) -> bytes:
    data = bytearray()
    size = announced
    for piece in pieces if size <= most else ():
        data += piece
        size = max(size, len(data))
        if size > most:
            break
    if size > most:
        raise FetchError(f"{where}: an image may have at most {most} bytes, got at least {size}")
    return _checked(bytes(data), where=where)


def _require_type(media_type: str, *, where: str) -> None:
    if media_type.strip().lower() not in TYPES:
        raise FetchError(f"{where}: the media type must be {_ALLOWED}, got {brief(media_type.strip(), 60)}")


def _checked(data: bytes, *, where: str) -> bytes:
    if not any(begin.match(data) for begin in TYPES.values()):
        raise FetchError(f"{where}: the file must be {_ALLOWED}, but its {len(data)} bytes do not begin like one")
    return data


def _show(url: str) -> str:
    """Return a URL for a message, without its secret parts."""
    text = re.sub(r"(?<=//)[^/?#]*@", "", re.split(r"[?#]", url, maxsplit=1)[0], count=1)
    return plain(text, 120)


@cache
def _tls() -> ssl.SSLContext:
    return httpcore2.default_ssl_context()


class _Checked(httpcore2.NetworkBackend):
    """A network backend that connects to allowed addresses only, and gives up at the deadline."""

    def __init__(self, policy: UrlPolicy, deadline: float, where: str):
        self._policy, self._deadline, self._where = policy, deadline, where
        self._sockets = httpcore2.SyncBackend()

    def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        """Connect to the first of the host's addresses that answers, after a check of them all."""
        failed: Exception = httpcore2.ConnectError("the host has no address")
        addresses = self._addresses(host, port)
        for remaining, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            try:  # an address that does not answer leaves time for the others
                stream = self._sockets.connect_tcp(address, port, timeout=_left(self._deadline) / remaining)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
            else:
                return _Timed(stream, self._deadline)
        raise failed

    def _addresses(self, host: str, port: int) -> list[str]:
        found: SimpleQueue[list[str] | OSError] = SimpleQueue()

        def look_up() -> None:
            try:
                found.put(self._policy.resolve(host, port))
            except (OSError, UnicodeError) as error:
                found.put(OSError(str(error)))

        Thread(target=look_up, daemon=True).start()  # in a thread, as the system's lookup has no time limit
        try:
            addresses = found.get(timeout=_left(self._deadline))
        except Empty:
            raise httpcore2.ConnectTimeout from None
        if isinstance(addresses, OSError):
            raise FetchError(f"{self._where}: the host has no address. Check its spelling.")
        if not all(is_allowed(address, self._policy.allow_private) for address in addresses):
            raise FetchError(f"{self._where}: every address of the host must be public, and one is not")
        return addresses


class _Timed(httpcore2.NetworkStream):
    """A connection with one deadline for all of its steps, so that slow steps do not add up.

    It ignores the timeouts that a caller passes for single steps.
    """

    def __init__(self, stream: httpcore2.NetworkStream, deadline: float):
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Timed(self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline)), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    """Return the seconds until the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout
    return left

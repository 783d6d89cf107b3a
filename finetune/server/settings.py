"""The settings of a server: its limits, its times, and the clients that it answers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The bounds of one server; most of them are options of ``finetune serve``.

    Attributes:
        allow: the patterns of adapters that are loaded on the first request: ``*`` stands for any characters of
            ``ns/name`` or, where the pattern has an ``@``, of ``ns/name@version``.
        allow_urls: True if an image may be an http(s) URL of a public host.
        max_batch: the maximum number of rows in a batch.
        max_queue: the maximum number of requests that wait for an answer, including those that the server reads and
            prepares; one client may have three quarters of them.
        max_connections: the maximum number of open connections.
        max_address_connections: the maximum number of open connections of one address.
        max_new_tokens: the largest number of new tokens that a request may ask for.
        max_body_bytes: the limit, in bytes, for the body of a request.
        max_images: the maximum number of images in a request.
        max_image_pixels: the limit for width x height of an image.
        head_seconds: the number of seconds that a connection may take to send the head of a request.
        body_seconds: the number of seconds that a connection may take to send the body of a request.
        queue_seconds: the number of seconds that a request may wait until its batch begins.
        request_seconds: the number of seconds that a request may take in all.
        stop_seconds: the number of seconds that running requests have to end when the server stops.
        known_seconds: the number of seconds for which a failed load of an adapter and the list of the registry are
            reused.
        api_keys: the accepted API keys; empty if clients need none.
    """

    allow: tuple[str, ...] = ()
    allow_urls: bool = False
    max_batch: int = 16
    max_queue: int = 64
    max_connections: int = 1000
    max_address_connections: int = 250
    max_new_tokens: int = 512
    max_body_bytes: int = 20 * 1024 * 1024
    max_images: int = 8
    max_image_pixels: int = 16_000_000
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    queue_seconds: float = 60.0
    request_seconds: float = 300.0
    stop_seconds: float = 30.0
    known_seconds: float = 10.0
    api_keys: tuple[str, ...] = field(default=(), repr=False)

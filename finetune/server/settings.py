"""What a server takes, how long it waits, and whom it answers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Bounds of one server; every one of them is an option of ``finetune serve``.

    Attributes:
        allow: patterns of adapters that are loaded when they are asked for: ``*`` stands for any characters of
            ``ns/name`` or, where the pattern has an ``@``, of ``ns/name@version``.
        allow_urls: whether an image may be named by an http(s) URL of a public host.
        max_batch: rows that are answered at once.
        max_queue: requests that may wait to be answered, those being read and prepared among them; one client may
            have three quarters of them.
        max_connections: that may be open.
        max_address_connections: that one address may have open.
        max_new_tokens: that a request may ask for.
        max_body_bytes: of a request.
        max_images: of a request.
        max_image_pixels: width x height of an image.
        head_seconds: a connection may take until the head of a request has come.
        body_seconds: the body of a request may take to come.
        queue_seconds: a request may wait until it is answered.
        request_seconds: a request may take in all.
        stop_seconds: requests that run have to end, when the server is asked to stop.
        known_seconds: for which it is remembered that an adapter could not be had, and what the registry lists.
        api_keys: that requests may come with; none where everybody may ask.
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

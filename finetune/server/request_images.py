"""The images of a request: fetched if they are URLs of other hosts, and decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.data.images import OVER_CAP
from finetune.errors import DataError, RequestError, RowError
from finetune.serving.urls import UrlPolicy, fetch_image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from finetune.data.image_workers import ImageWorkers
    from finetune.server.schema import ChatRequest, ImagePart
    from finetune.server.settings import Settings


def fetch_images(request: ChatRequest, settings: Settings, *, is_over: Callable[[], bool]) -> dict[str, bytes]:
    """Return the files of the images that a request names by the URLs of other hosts, by URL.

    Raises:
        RequestError: an image cannot be fetched, or all images together exceed the limit for the body of a request.
    """
    files: dict[str, bytes] = {}
    left = settings.max_body_bytes
    for where, url in _image_urls(request, settings):
        if not _is_data(url) and url not in files:
            _refuse_over(is_over)
            files[url] = _read(url, where, max_bytes=left)
            left -= len(files[url])
    return files


def decode_images(
    request: ChatRequest,
    settings: Settings,
    *,
    fetched: Mapping[str, bytes],
    workers: ImageWorkers,
    page: int | None,
    is_over: Callable[[], bool],
) -> list[np.ndarray]:
    """Return the images of a request in order: [H, W, 3] uint8, or the values [H, W] of a deep grey image.

    Args:
        request: the request.
        settings: the bounds of the server, which limit the number and size of images.
        fetched: the files that ``fetch_images`` returned.
        workers: the workers that decode the images.
        page: the page of TIFF files, as in ``ImageOptions``.
        is_over: the function that returns True once the client has gone; then the remaining images are not decoded.

    Raises:
        RequestError: an image cannot be used, or there are too many.
    """
    images = []
    for where, url in _image_urls(request, settings):
        _refuse_over(is_over)
        data = fetched[url] if url in fetched else _read(url, where, max_bytes=settings.max_body_bytes)
        try:
            images.append(workers.pixels(data, max_pixels=settings.max_image_pixels, name=where, page=page))
        except RowError as error:
            over_cap = f"width x height must be at most {settings.max_image_pixels} pixels. Make the image smaller."
            refusal = _unusable(over_cap if error.reason == OVER_CAP else str(error), where)
        else:
            continue
        raise refusal  # outside of the handler, in which the frames of the first error would stay
    return images


def _image_urls(request: ChatRequest, settings: Settings) -> list[tuple[str, str]]:
    """Return the place of each image part in a request, and its URL."""
    parts: list[tuple[str, ImagePart]] = [
        (f"messages[{number}].content[{place}].image_url.url", part)
        for number, message in enumerate(request.messages)
        if message.role == "user" and not isinstance(message.content, str)
        for place, part in enumerate(message.content)
        if part.type == "image_url"
    ]
    if len(parts) > settings.max_images:
        raise RequestError(
            f"A request may have at most {settings.max_images} images, got {len(parts)}. Send fewer images.",
            status=400,
            code="too_many_images",
            param="messages",
        )
    urls = [(where, part.image_url.url) for where, part in parts]
    for where, url in urls:
        if not settings.allow_urls and not _is_data(url):
            raise RequestError(
                f"{where} must be a data URL: this server fetches no images. Send data:image/png;base64,...",
                status=400,
                code="invalid_image_url",
                param=where,
            )
    return urls


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _read(url: str, where: str, *, max_bytes: int) -> bytes:
    """Return the file in a data URL, or the file at any other URL."""
    try:
        return fetch_image(url, UrlPolicy(max_bytes=max_bytes))
    except DataError as error:
        raise _unusable(str(error), where) from None


def _refuse_over(is_over: Callable[[], bool]) -> None:
    if is_over():
        raise RequestError("The client closed the request before its answer.", status=499, code="cancelled")


def _unusable(problem: str, where: str) -> RequestError:
    message = problem if where in problem else f"{where}: {problem}"
    return RequestError(message, status=400, code="invalid_image", param=where)

"""From a request's messages to the row that is put to its adapter, every image decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.data.conversation import read_conversation
from finetune.data.images import OVER_CAP
from finetune.errors import DataError, RequestError, RowError
from finetune.example import Example, answer
from finetune.serving.urls import UrlPolicy, fetch_image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from finetune.data.image_workers import ImageWorkers
    from finetune.example import Message
    from finetune.recipe import VqaSection
    from finetune.server.schema import ChatRequest, ImagePart, TextPart
    from finetune.server.settings import Settings


def fetch_images(request: ChatRequest, settings: Settings, *, is_over: Callable[[], bool]) -> dict[str, bytes]:
    """Return the files of the images that a request names by the URLs of other hosts.

    Raises:
        RequestError: one cannot be fetched, or all together are larger than a request that brings them itself.
    """
    files: dict[str, bytes] = {}
    left = settings.max_body_bytes
    for where, part in _image_parts(request, settings):
        url = part.image_url.url
        if not _is_data(url) and url not in files:
            files[url] = _read(url, where, settings, left, is_over)
            left -= len(files[url])
    return files


def to_example(
    request: ChatRequest,
    section: VqaSection,
    settings: Settings,
    *,
    fetched: Mapping[str, bytes],
    workers: ImageWorkers,
    page: int | None,
    is_over: Callable[[], bool],
) -> Example:
    """Return the row of a request with its decoded images.

    One user's message with one text is a question, put as the adapter was trained on questions, with its images
    before or after it as they were then; anything else is a conversation, as it stands.

    Args:
        request: what was asked.
        section: how its adapter is asked.
        settings: which images are taken.
        fetched: what ``fetch_images`` returned.
        workers: decode the images.
        page: of TIFF files, as ``ImageOptions`` has it.
        is_over: tells whether nobody waits for the answer any more; no other image is decoded then.

    Raises:
        RequestError: an image, or the order of the messages, is not what it must be.
    """
    images = _images(request, settings, fetched, workers, page, is_over)
    question = _question(request)
    try:
        if question is not None:
            prompt = section.ask(question, num_images=len(images))
        else:
            prompt = section.converse(_conversation(request))
    except DataError as error:
        raise RequestError(f"{error}.", status=400, code="invalid_messages", param="messages") from None
    return Example(id="request", messages=[*prompt, answer("")], images=list(images), answers=[""])


def _question(request: ChatRequest) -> str | None:
    """Returns the question that the messages are; None where they are more than that."""
    if len(request.messages) != 1 or request.messages[0].role != "user":
        return None
    content = request.messages[0].content
    texts = [content] if isinstance(content, str) else [part.text for part in content if part.type == "text"]
    return texts[0] if len(texts) == 1 and texts[0].strip() else None


def _conversation(request: ChatRequest) -> list[Message]:
    messages = []
    for message in request.messages:
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": _parts(message.content)})
    conversation, _ = read_conversation(messages, where="messages")
    if conversation[-1]["role"] != "user":
        raise DataError("messages: the last message is the one that is answered, so it is the user's")
    return conversation


def _parts(content: str | Sequence[TextPart | ImagePart]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} if part.type == "text" else {"type": "image"} for part in content]


def _images(
    request: ChatRequest,
    settings: Settings,
    fetched: Mapping[str, bytes],
    workers: ImageWorkers,
    page: int | None,
    is_over: Callable[[], bool],
) -> list[np.ndarray]:
    """Return the images of a request: [H, W, 3] uint8, or the values [H, W] of a deep grey image."""
    images, left = [], settings.max_body_bytes
    for where, part in _image_parts(request, settings):
        url = part.image_url.url
        data = fetched[url] if url in fetched else _read(url, where, settings, left, is_over)
        left -= len(data)
        try:
            images.append(workers.pixels(data, max_pixels=settings.max_image_pixels, name=where, page=page))
        except RowError as error:
            raise _unusable(error, where, settings) from None
    return images


def _image_parts(request: ChatRequest, settings: Settings) -> list[tuple[str, ImagePart]]:
    """Return the image parts of a request, each with where it stands."""
    parts = [
        (f"messages[{number}].content[{place}].image_url.url", part)
        for number, message in enumerate(request.messages)
        if message.role == "user" and not isinstance(message.content, str)
        for place, part in enumerate(message.content)
        if part.type == "image_url"
    ]
    if len(parts) > settings.max_images:
        raise RequestError(
            f"A request has at most {settings.max_images} pictures, and this one {len(parts)}.",
            status=400,
            code="too_many_images",
            param="messages",
        )
    for where, part in parts:
        if not settings.allow_urls and not _is_data(part.image_url.url):
            raise RequestError(
                f"{where}: this server fetches no pictures. Send the picture itself: data:image/png;base64,...",
                status=400,
                code="invalid_image_url",
                param=where,
            )
    return parts


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _read(url: str, where: str, settings: Settings, max_bytes: int, is_over: Callable[[], bool]) -> bytes:
    """Return the file that a URL holds or names."""
    if is_over():
        raise RequestError("Nobody waits for the answer any more.", status=499, code="cancelled")
    try:
        return fetch_image(url, UrlPolicy(max_bytes=max_bytes))
    except DataError as error:
        raise _unusable(error, where, settings) from None


def _unusable(error: DataError, where: str, settings: Settings) -> RequestError:
    message = str(error) if where in str(error) else f"{where}: {error}"
    if isinstance(error, RowError) and error.reason == OVER_CAP:
        most = settings.max_image_pixels
        message = f"{where}: width x height is over {most} pixels. Make the picture smaller."
    return RequestError(message, status=400, code="invalid_image", param=where)

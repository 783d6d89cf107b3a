"""From a request's messages to the row that is put to its adapter, every image decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.data.conversation import read_conversation
from finetune.data.images import OVER_CAP
from finetune.errors import DataError, RequestError, RowError
from finetune.example import Example, answer
from finetune.serving.urls import UrlPolicy, fetch_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from finetune.data.image_workers import ImageWorkers
    from finetune.example import Message
    from finetune.recipe import VqaSection
    from finetune.server.schema import ChatRequest, ImagePart, TextPart
    from finetune.server.settings import Settings


def to_example(
    request: ChatRequest,
    section: VqaSection,
    settings: Settings,
    *,
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
        workers: decode the images.
        page: of TIFF files, as ``ImageOptions`` has it.
        is_over: tells whether nobody waits for the answer any more; no other image is decoded then.

    Raises:
        RequestError: an image, or the order of the messages, is not what it must be.
    """
    images = _images(request, settings, workers, page, is_over)
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
    request: ChatRequest, settings: Settings, workers: ImageWorkers, page: int | None, is_over: Callable[[], bool]
) -> list[np.ndarray]:
    """Return the images of a request: [H, W, 3] uint8, or the values [H, W] of a deep grey image.

    All files together are no larger than a request that brings them itself.
    """
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
    images, left = [], settings.max_body_bytes
    for where, part in parts:
        if is_over():
            raise RequestError("Nobody waits for the answer any more.", status=499, code="cancelled")
        try:
            data = _file(part, where, settings, max_bytes=left)
            images.append(workers.pixels(data, max_pixels=settings.max_image_pixels, name=where, page=page))
        except DataError as error:
            message = str(error) if where in str(error) else f"{where}: {error}"
            if isinstance(error, RowError) and error.reason == OVER_CAP:
                message = (
                    f"{where}: width x height is over {settings.max_image_pixels} pixels. Make the picture smaller."
                )
            raise RequestError(message, status=400, code="invalid_image", param=where) from None
        left -= len(data)
    return images


def _file(part: ImagePart, where: str, settings: Settings, *, max_bytes: int) -> bytes:
    url = part.image_url.url
    if not settings.allow_urls and url[:5].lower() != "data:":
        raise RequestError(
            f"{where}: this server fetches no pictures. Send the picture itself: data:image/png;base64,...",
            status=400,
            code="invalid_image_url",
            param=where,
        )
    return fetch_image(url, UrlPolicy(max_bytes=max_bytes))

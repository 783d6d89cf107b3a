"""The row of a request: its messages in the form that its adapter was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.core.example import Example, answer, as_images
from finetune.data.conversation import read_conversation
from finetune.errors import DataError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from finetune.core.example import Message
    from finetune.recipe import PromptSection
    from finetune.server.schema import ChatRequest, ImagePart, TextPart


def to_example(request: ChatRequest, section: PromptSection, images: Sequence[np.ndarray]) -> Example:
    """Return the row of a request.

    A single user message with one text is a question. Its prompt has the form of the adapter's training, with the
    images before or after the question as in training. Any other request is a conversation, and stays as it is.

    Args:
        request: the request.
        section: the task section of its adapter, which makes the prompt.
        images: the images of the request, in order.

    Raises:
        RequestError: the order of the messages is not valid.
    """
    question = _question(request)
    try:
        if question is not None:
            prompt = section.ask(question, num_images=len(images))
        else:
            prompt = section.converse(_conversation(request))
    except DataError as error:
        raise RequestError(f"{error}.", status=400, code="invalid_messages", param="messages") from None
    return Example(id="request", messages=[*prompt, answer("")], media=as_images(images), answers=[""])


def _question(request: ChatRequest) -> str | None:
    """Return the question if the messages are a single question; else None."""
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
        raise DataError(f"messages: the last message must have role user, got {conversation[-1]['role']}")
    return conversation


def _parts(content: str | Sequence[TextPart | ImagePart]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} if part.type == "text" else {"type": "image"} for part in content]

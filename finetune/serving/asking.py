"""Rows from the images and texts of an app."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.core.example import Example, answer, as_images, show
from finetune.data.conversation import num_image_parts, read_conversation
from finetune.data.images import as_source
from finetune.errors import DataError, FetchError, brief
from finetune.serving.urls import fetch_image, is_url

if TYPE_CHECKING:
    from finetune.core.example import ImageSource, Message
    from finetune.recipe import PromptSection, TaskSection
    from finetune.serving.urls import UrlPolicy


def question_row(
    section: TaskSection, image: Any, question: str, *, urls: UrlPolicy | None, id: str = "question"
) -> Example:
    """Return the row that asks a question.

    Args:
        section: the task section that makes the prompt.
        image: an image, None for a question without one, or a list for one with several.
        question: the text of the user.
        urls: the policy by which images are fetched from URLs; None to fetch none.
        id: the name of the row in errors.

    Raises:
        DataError: the question is not a text, or an image cannot be used.
    """
    if not isinstance(question, str):
        raise DataError(f"{id}: a question must be a str, got {brief(question)}")
    images = image if isinstance(image, list) else [] if image is None else [image]
    return _row(section.ask(question, num_images=len(images)), images, urls, id)


def conversation_row(section: PromptSection, messages: list[Message], *, urls: UrlPolicy | None) -> Example:
    """Return the row that asks for the assistant's next turn; arguments as for ``question_row``.

    Raises:
        DataError: ``messages`` is not a conversation that ends with the user, or an image cannot be used.
    """
    conversation, images = read_conversation(messages, where="chat")
    if conversation[-1]["role"] != "user":
        role = conversation[-1]["role"]
        raise DataError(f"chat: the last message must have role user, got {role}. Add the user's next message.")
    if len(images) != num_image_parts(conversation):
        raise DataError('chat: a part {"type": "image"} lacks its image: put it under "image"')
    return _row(section.converse(conversation), images, urls, "chat")


def image_row(image: Any, *, urls: UrlPolicy | None) -> Example:
    """Return the row that shows an image and asks nothing; arguments as for ``question_row``."""
    return _row(show(), [image], urls, "image")


def _row(prompt: list[Message], images: list[Any], urls: UrlPolicy | None, id: str) -> Example:
    try:
        sources = [_source(image, urls) for image in images]
    except DataError as error:
        raise type(error)(f"{id}: {error}") from None
    return Example(id=id, messages=[*prompt, answer("")], media=as_images(sources), answers=[""])


def _source(image: Any, urls: UrlPolicy | None) -> ImageSource:
    if not (isinstance(image, str) and is_url(image)):
        return as_source(image)
    if urls is None:
        raise FetchError(
            f"{brief(image, 60)}: this model fetches no images from URLs. Allow it with "
            "finetune.load(..., allow_urls=True)."
        )
    return fetch_image(image, urls)

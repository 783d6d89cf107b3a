"""Conversations in the usual chat formats, checked and brought into one form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.data.other_fields import is_empty
from finetune.errors import RowError, brief

if TYPE_CHECKING:
    from finetune.core.example import Message

ROLES = ("system", "user", "assistant")

# Keys that change what a message or a part says, and why they are refused.
_TOOLS = "tools are not rendered into the prompt"
_THOUGHTS = "a turn is its content alone; what the model thinks before it has no place"
_SIZES = "an image is shown as the processor of the base has it"
_MESSAGE_KEYS = {
    "tool_calls": _TOOLS,
    "tool_call_id": _TOOLS,
    "function_call": _TOOLS,
    "reasoning_content": _THOUGHTS,
    "thinking": _THOUGHTS,
    "refusal": "write it as the content",
    "images": "an image of a message is a part of its content",
    "image": "an image of a message is a part of its content",
    "videos": "only images are read",
    "audio": "only images are read",
}
_ONE_KIND = "a part is a text or an image, each a part of its own"
_PART_KEYS = {
    "min_pixels": _SIZES,
    "max_pixels": _SIZES,
    "resized_height": _SIZES,
    "resized_width": _SIZES,
    "video": "only images are read",
    "audio": "only images are read",
    "bbox": "the whole image is shown",
}


def read_conversation(messages: Any, *, where: str) -> tuple[list[Message], list[Any]]:
    """Check a conversation in Hugging Face's chat format.

    Args:
        messages: dicts of ``role`` and ``content``; content is a text or a list of ``{"type": "text", "text": ...}``
            and ``{"type": "image"}`` parts, an image part with its image under ``image`` or ``path`` or without.
        where: the name of the conversation in errors.

    Returns:
        The conversation with every content a list of parts, and the images that stood in it, one a part or none.

    Raises:
        RowError: it is not a conversation whose user and assistant take turns.
    """
    if not isinstance(messages, list) or not messages:
        raise _wrong(where, f"a conversation is a list of messages that is not empty, not {brief(messages, 80)}")
    out: list[Message] = []
    images: list[Any] = []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise _wrong(place, f"a message has role and content; this is {brief(message, 80)}")
        role = message.get("role")
        if role not in ROLES:
            raise _wrong(place, f"the role is {brief(role, 40)}; allowed are {', '.join(ROLES)}")
        expected = _next_role(out)
        if role != expected and not (role == "system" and number == 1):
            raise _wrong(place, f"after {out[-1]['role'] if out else 'the start'} comes {expected}, not {role}")
        _refuse_keys(message, _MESSAGE_KEYS, place)
        out.append({"role": role, "content": _content(message.get("content"), role, place, images)})
    parts = num_image_parts(out)
    if images and len(images) != parts:
        raise _wrong(where, f"{len(images)} of {parts} image parts name their image: either all do or none")
    return out, images


def num_image_parts(messages: list[Message]) -> int:
    """Return the number of image parts in a conversation."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _next_role(before: list[Message]) -> str:
    return "assistant" if before and before[-1]["role"] == "user" else "user"


def _content(content: Any, role: str, place: str, images: list[Any]) -> list[dict[str, str]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise _wrong(place, f"content is a text or a list of parts that is not empty, not {brief(content, 80)}")
    parts: list[dict[str, str]] = []
    for part in content:
        # A table has all columns in all rows: what a part does not have is None there.
        given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        match given.get("type"):
            case "text" if isinstance(given.get("text"), str):
                _refuse_keys(given, _PART_KEYS | dict.fromkeys(("image", "path", "index"), _ONE_KIND), place)
                parts.append({"type": "text", "text": given["text"]})
            case "image" if role == "user":
                if {"url", "base64"} & given.keys():
                    raise _wrong(
                        place,
                        "an image stands under image or path, or beside the messages; url and base64 are not read",
                    )
                _refuse_keys(given, _PART_KEYS | {"text": _ONE_KIND}, place)
                if "index" in given and {"image", "path"} & given.keys():
                    raise _wrong(place, "an image part names its image or gives its index, not both")
                images += [given[key] for key in ("image", "path") if key in given][:1]
                parts.append({"type": "image"})
            case "image":
                raise _wrong(place, f"only a user's message may hold images, not the {role}'s")
            case _:
                raise _wrong(
                    place, f'a part is {{"type": "text", "text": ...}} or {{"type": "image"}}, not {brief(part, 80)}'
                )
    text = "".join(part.get("text", "") for part in parts)
    if not text.strip() and (role != "user" or all(part["type"] == "text" for part in parts)):
        raise _wrong(place, f"the {role}'s text is empty", reason="empty text")
    return parts


def _refuse_keys(given: dict[str, Any], keys: dict[str, str], place: str) -> None:
    """Raise RowError where something has a key that would change it; one that is empty is as if it were absent."""
    for key, reason in keys.items():
        if not is_empty(given.get(key)):
            raise _wrong(place, f"{key!r} is not supported: {reason}", reason="unsupported field")


def _wrong(where: str, what: str, *, reason: str = "not a conversation") -> RowError:
    return RowError(f"{where}: {what}", reason=reason)

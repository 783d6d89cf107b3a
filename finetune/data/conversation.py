"""Conversations in the usual chat formats: checked, and converted to one form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.data.other_fields import is_empty
from finetune.errors import RowError, brief

if TYPE_CHECKING:
    from finetune.core.example import Message

ROLES = ("system", "user", "assistant")

# Keys that change the meaning of a message or a part, and why they are refused.
_TOOLS = "tools are not rendered into the prompt"
_THOUGHTS = "only the content of a turn is rendered, without the reasoning before it"
_SIZES = "the processor of the base sets the size of an image"
_MESSAGE_KEYS = {
    "tool_calls": _TOOLS,
    "tool_call_id": _TOOLS,
    "function_call": _TOOLS,
    "reasoning_content": _THOUGHTS,
    "thinking": _THOUGHTS,
    "refusal": "a refusal is read from the content of the turn only",
    "images": "an image of a message is a part of its content",
    "image": "an image of a message is a part of its content",
    "videos": "only images are read",
    "audio": "only images are read",
}
_ONE_KIND = "a part must be a text or an image, not both"
_PART_KEYS = {
    "min_pixels": _SIZES,
    "max_pixels": _SIZES,
    "resized_height": _SIZES,
    "resized_width": _SIZES,
    "video": "only images are read",
    "audio": "only images are read",
    "bbox": "the base gets the whole image",
}


def read_conversation(messages: Any, *, where: str) -> tuple[list[Message], list[Any]]:
    """Check a conversation in Hugging Face's chat format.

    Args:
        messages: dicts of ``role`` and ``content``; content is a text or a list of ``{"type": "text", "text": ...}``
            and ``{"type": "image"}`` parts. An image part may give its image under ``image`` or ``path``.
        where: the name of the conversation in errors.

    Returns:
        The conversation with every content as a list of parts, and the images of its parts: one for each image part,
        or none.

    Raises:
        RowError: if it is not a conversation in which user and assistant take turns.
    """
    if not isinstance(messages, list) or not messages:
        raise _wrong(where, f"a conversation must be a non-empty list of messages, got {brief(messages, 80)}")
    out: list[Message] = []
    images: list[Any] = []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise _wrong(place, f"a message must be an object with role and content, got {brief(message, 80)}")
        role = message.get("role")
        if role not in ROLES:
            raise _wrong(place, f"the role must be one of {', '.join(ROLES)}, got {brief(role, 40)}")
        expected = _next_role(out)
        if role != expected and not (role == "system" and number == 1):
            before = f"after {out[-1]['role']}" if out else "at the start"
            raise _wrong(place, f"user and assistant must take turns: {before} the role must be {expected}, got {role}")
        _refuse_keys(message, _MESSAGE_KEYS, place)
        out.append({"role": role, "content": _content(message.get("content"), role, place, images)})
    parts = num_image_parts(out)
    if images and len(images) != parts:
        raise _wrong(
            where,
            f"either all image parts must name their image or none, got {len(images)} of {parts} parts that do. Name "
            "the others too.",
        )
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
        raise _wrong(place, f"content must be a text or a non-empty list of parts, got {brief(content, 80)}")
    parts: list[dict[str, str]] = []
    for part in content:
        # A table has all columns in all rows: a key that a part lacks is None there.
        given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        match given.get("type"):
            case "text" if isinstance(given.get("text"), str):
                _refuse_keys(given, _PART_KEYS | dict.fromkeys(("image", "path", "index"), _ONE_KIND), place)
                parts.append({"type": "text", "text": given["text"]})
            case "image" if role == "user":
                if unread := [key for key in ("url", "base64") if key in given]:
                    raise _wrong(
                        place,
                        "an image part must have its image under image or path, or take it from beside the messages, "
                        f"got {' and '.join(unread)}. Save the image as a file, and give its path.",
                    )
                _refuse_keys(given, _PART_KEYS | {"text": _ONE_KIND}, place)
                if "index" in given and {"image", "path"} & given.keys():
                    raise _wrong(
                        place, "an image part must name its image or give its index, got both. Remove one of them."
                    )
                images += [given[key] for key in ("image", "path") if key in given][:1]
                parts.append({"type": "image"})
            case "image":
                raise _wrong(
                    place,
                    f"only messages of the user may hold images, got one in a message of the role {role}. Remove it.",
                )
            case _:
                raise _wrong(
                    place,
                    f'a part must be {{"type": "text", "text": ...}} or {{"type": "image"}}, got {brief(part, 80)}',
                )
    text = "".join(part.get("text", "") for part in parts)
    if not text.strip() and (role != "user" or all(part["type"] == "text" for part in parts)):
        fault = f"a message of the role {role} must have a non-empty text, got {brief(text, 40)}"
        raise _wrong(place, fault, reason="empty text")
    return parts


def _refuse_keys(given: dict[str, Any], keys: dict[str, str], place: str) -> None:
    """Raise RowError if a message or part has one of ``keys``; an empty value counts as an absent one."""
    for key, reason in keys.items():
        if not is_empty(given.get(key)):
            raise _wrong(
                place,
                f"the key {key!r} is not supported, got {brief(given[key], 60)}: {reason}. Remove the key.",
                reason="unsupported field",
            )


def _wrong(where: str, what: str, *, reason: str = "not a conversation") -> RowError:
    return RowError(f"{where}: {what}", reason=reason)

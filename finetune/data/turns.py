"""Marks of the messages of a row beside their texts: the supervised turns, and the image of each image part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import RowError, brief

if TYPE_CHECKING:
    from collections.abc import Sequence

# Keys of a message that set whether its turn is supervised. OpenAI, ms-swift and Axolotl use these names.
SWITCHES = ("weight", "loss", "train")


def unsupervised_turns(messages: Sequence[dict[str, Any]], *, where: str) -> frozenset[int]:
    """Return the assistant turns, counted from 0, that are not supervised.

    Args:
        messages: the messages of the row, checked by ``read_conversation``.
        where: the name of the row in errors.

    Raises:
        RowError: if a value is neither 0 nor 1, two values of a message differ, or a value supervises a turn of
            another role.
    """
    left_out: set[int] = set()
    turn = 0
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        switches = {key: _switch(key, message[key], place) for key in SWITCHES if message.get(key) is not None}
        if len(set(switches.values())) > 1:
            shown = " and ".join(f"{key}={message[key]!r}" for key in switches)
            raise _wrong(place, f"{' and '.join(switches)} must agree, got {shown}. Keep one of them.")
        supervised = next(iter(switches.values()), None)
        if message["role"] == "assistant":
            if supervised is False:
                left_out.add(turn)
            turn += 1
        elif supervised:
            raise _wrong(
                place,
                f"only assistant turns can be supervised, got {next(iter(switches))} set on a turn of the role "
                f"{message['role']}. Remove the key.",
            )
    return frozenset(left_out)


def image_order(messages: Sequence[dict[str, Any]], *, where: str) -> list[int] | None:
    """Return the number of the row's image for each image part; None if no part gives an ``index``.

    Args:
        messages: the messages of the row, checked by ``read_conversation``.
        where: the name of the row in errors.

    Raises:
        RowError: if the indices do not name each image once.
    """
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    given = [part.get("index") for content in contents for part in content if part["type"] == "image"]
    if all(index is None for index in given):
        return None
    wanted = list(range(len(given)))
    if any(type(index) is not int for index in given) or sorted(given) != wanted:
        raise _wrong(
            where,
            f"the index of {len(given)} image parts must name each image of the row once, from 0 to {len(given) - 1}, "
            f"got {brief(given)}. Correct the index values.",
        )
    return given


def _switch(key: str, value: Any, place: str) -> bool:
    # A table may store the numbers as floating-point numbers, and truth values as numbers.
    if isinstance(value, bool | int | float) and value in (0, 1) and not (key == "weight" and isinstance(value, bool)):
        return bool(value)
    allowed = "0 or 1" if key == "weight" else "true or false"
    raise _wrong(
        place, f"{key} must be {allowed}, got {brief(value, 40)}. A turn is supervised as a whole or not at all."
    )


def _wrong(where: str, what: str) -> RowError:
    return RowError(f"{where}: {what}", reason="not a conversation")

"""Predictions of a model: one small frozen class for each kind, written to JSON and read back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from finetune.errors import DataError, plain
from finetune.lookup import look_up

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class _Prediction:
    """The base class of all predictions.

    Attributes:
        type: the name of the class in JSON.
    """

    type: ClassVar[str]
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain data with the type and every field of the prediction's own kind."""
        own = fields(_KINDS[self.type])  # a subclass may have more fields, which JSON leaves out
        return {"type": self.type, **{each.name: _plain(getattr(self, each.name)) for each in own}}


@dataclass(frozen=True, kw_only=True)
class Text(_Prediction):
    """A generated text.

    Attributes:
        text: the text without special tokens and without outer white space.
        finish_reason: ``stop`` if the model or a stop sequence ended the text; ``length`` if the row's limit did.
    """

    type: ClassVar[str] = "text"
    text: str
    finish_reason: FinishReason = "stop"

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class Label(_Prediction):
    """One of the labels that are allowed for a row.

    Attributes:
        label: the label with the highest score.
        scores: each allowed label -> its score.
    """

    type: ClassVar[str] = "label"
    label: str
    scores: dict[str, float]

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, kw_only=True)
class Number(_Prediction):
    """A number, with a unit or without."""

    type: ClassVar[str] = "number"
    value: float
    unit: str | None = None

    def __str__(self) -> str:
        return f"{self.value:.6g}" + (f" {self.unit}" if self.unit else "")


@dataclass(frozen=True, kw_only=True)
class Box:
    """One region of an image: its left, upper, right and lower edge in pixels, its label and its score."""

    __pydantic_config__: ClassVar[ConfigDict] = _Prediction.__pydantic_config__
    x1: float
    y1: float
    x2: float
    y2: float
    label: str
    score: float

    def __str__(self) -> str:
        return f"{self.label} [{self.x1:.6g}, {self.y1:.6g}, {self.x2:.6g}, {self.y2:.6g}]"


@dataclass(frozen=True, kw_only=True)
class Boxes(_Prediction):
    """The regions that the model found; there may be none."""

    type: ClassVar[str] = "boxes"
    boxes: tuple[Box, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.boxes))


@dataclass(frozen=True, kw_only=True)
class Image(_Prediction):
    """An image that the model made.

    Attributes:
        path: the path of the image file.
        sha256: the SHA-256 digest of the file.
    """

    type: ClassVar[str] = "image"
    path: str
    sha256: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, kw_only=True)
class Embedding(_Prediction):
    """The values of an embedding, [D]."""

    type: ClassVar[str] = "embedding"
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"embedding of {len(self.values)} values"


@dataclass(frozen=True, kw_only=True)
class Ranking(_Prediction):
    """Items in order, the best first, each with its score."""

    type: ClassVar[str] = "ranking"
    items: tuple[str, ...]
    scores: tuple[float, ...]

    def __str__(self) -> str:
        return ", ".join(self.items)


Prediction = Text | Label | Number | Boxes | Image | Embedding | Ranking
_KINDS: dict[str, Any] = {kind.type: kind for kind in (Text, Label, Number, Boxes, Image, Embedding, Ranking)}


def prediction_from_json(value: Any) -> Prediction:
    """Return the prediction that ``to_json`` wrote.

    Raises:
        DataError: the type is unknown, a field is missing, unknown or of another type, or a number is not finite.
    """
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise DataError(f"a prediction must be an object with a type, got {plain(repr(value), 80)}")
    data = {name: part for name, part in value.items() if name != "type"}
    kind = look_up(_KINDS, value["type"], what="type of a prediction", error=DataError)
    try:
        found: Prediction = _reader(kind).validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = plain(".".join(map(str, first["loc"])))
        raise DataError(
            f"a prediction of type {value['type']} must have valid fields, but `{where}` is invalid: "
            f"{plain(first['msg'])}"
        ) from None
    if isinstance(found, Ranking) and len(found.items) != len(found.scores):
        raise DataError(
            f"a prediction of type ranking must have one score an item, got {len(found.items)} items and "
            f"{len(found.scores)} scores"
        )
    return found


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, Box):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"a prediction must hold finite numbers, got {value}")
    return value

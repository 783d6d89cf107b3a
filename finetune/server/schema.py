"""The bodies of requests and answers, with OpenAI's names: https://platform.openai.com/docs/api-reference/chat.

The server accepts fields that change nothing: null under any name, and the values that ``AsksNothing`` lists, because
clients send them by default. It refuses any other value, because that value asks for another answer.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import core_schema

MOST_FIELDS = 100  # of one object; pydantic makes a message for each unknown field
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Parts = Field(min_length=1, max_length=1000)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class AsksNothing:
    """The type of a field that is read and changes nothing, put into ``Annotated``: null or one of ``values``.

    Args:
        values: the JSON values that are accepted besides null.
    """

    def __init__(self, *values: Any):
        self.allowed = (None, *values)

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: Any, _handler: Any) -> dict[str, Any]:
        return {"enum": list(self.allowed)}

    def _check(self, value: Any) -> Any:
        # 0 == False in Python, but not in JSON.
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.allowed):
            return value
        raise ValueError(f"must be {' or '.join(map(json.dumps, self.allowed))}")


_WHOLE = BeforeValidator(_whole)  # 1.0 is an integer in JSON
NumTokens = Annotated[int, Field(ge=1, le=100_000), _WHOLE]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), _WHOLE]
Zero = Annotated[Any, AsksNothing(0)]
Empty = Annotated[Any, AsksNothing([])]
Null = Annotated[Any, AsksNothing()]


class _Asked(BaseModel):
    """A part of a request: exactly the fields of the class, of exactly their types, and null under any name."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_extra={"additionalProperties": {"type": "null"}}
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_null(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > MOST_FIELDS:
            raise ValueError(f"an object may have at most {MOST_FIELDS} fields, got {len(given)}")
        return {name: value for name, value in given.items() if value is not None or name in cls.model_fields}


class _Sent(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(frozen=True)


class TextPart(_Asked):
    """Some text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Asked):
    """The URL of an image: ``data:image/png;base64,...``, or http(s) where the server allows that."""

    url: Text
    detail: Annotated[Any, AsksNothing("auto")] = None


class ImagePart(_Asked):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class SystemMessage(_Asked):
    """Instructions, in the place of the adapter's own where it was trained with some."""

    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], Parts]


class UserMessage(_Asked):
    """The user's texts and images."""

    role: Literal["user"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Parts]


class AssistantMessage(_Asked):
    """An earlier answer, as it was sent; clients send its empty fields back."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], Parts]
    refusal: Null = None
    annotations: Empty = None
    audio: Null = None
    function_call: Null = None
    tool_calls: Empty = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Asked):
    """The options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, AsksNothing(False)] = None


class ChatRequest(_Asked):
    """A question or conversation, and the adapter that answers it.

    Answers are greedy, as in the evaluation of adapters. ``temperature`` 0 requests this; 1 is accepted, because it is
    OpenAI's default. ``seed`` changes nothing, as answers are always the same; nor do ``user``, ``metadata``,
    ``safety_identifier``, ``prompt_cache_key``, ``prompt_cache_retention`` and ``service_tier``.
    """

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: NumTokens | None = None
    max_tokens: NumTokens | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    temperature: Annotated[Any, AsksNothing(0, 1)] = None
    top_p: Annotated[Any, AsksNothing(1)] = None
    n: Annotated[Any, AsksNothing(1)] = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Annotated[Any, AsksNothing({})] = None
    logprobs: Annotated[Any, AsksNothing(False)] = None
    top_logprobs: Zero = None
    tools: Empty = None
    tool_choice: Annotated[Any, AsksNothing("none", "auto")] = None
    functions: Empty = None
    function_call: Annotated[Any, AsksNothing("none", "auto")] = None
    response_format: Annotated[Any, AsksNothing({"type": "text"})] = None
    modalities: Annotated[Any, AsksNothing(["text"])] = None
    audio: Null = None
    prediction: Null = None
    reasoning_effort: Annotated[Any, AsksNothing("none")] = None
    verbosity: Annotated[Any, AsksNothing("medium")] = None
    web_search_options: Null = None
    store: Annotated[Any, AsksNothing(False)] = None


class Usage(_Sent):
    """Numbers of tokens: ``prompt_tokens`` counts those of images, ``completion_tokens`` the end token too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answered(_Sent):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(_Sent):
    """The one answer."""

    index: Literal[0] = 0
    message: Answered
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(_Sent):
    """An answer; ``system_fingerprint`` is of the adapter's manifest, or of the base."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class Delta(_Sent):
    """A piece of an answer; the first one has the role, and the last one is empty."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Sent):
    """The one answer, as it grows."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class ChatCompletionChunk(_Sent):
    """One event of a stream; where usage was asked for, the last one has it and no choice, the others null."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(_Sent):
    """An adapter that may be asked, or the plain base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(_Sent):
    """The models that may be asked."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(_Sent):
    """The error: a message, the parameter that caused it, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Sent):
    """The body of an error."""

    error: ErrorDetail


class Health(_Sent):
    """The state of the server: the process runs, or it takes requests."""

    status: Literal["ok"] = "ok"

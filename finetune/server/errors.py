"""Errors as clients get them, in OpenAI's form."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING
from uuid import uuid4

from fastapi.responses import JSONResponse

from finetune.errors import AdapterError, DataError, NotFoundError, RequestError, StoreError, YankedError, brief
from finetune.server.schema import ErrorBody, ErrorDetail

if TYPE_CHECKING:
    from pydantic import ValidationError

_log = logging.getLogger(__name__)

# What clients ask for and this server does not do, with what to do instead.
NOT_DONE = {
    "temperature": "answers are the most likely ones, as adapters were trained and evaluated: send 0, or leave it out",
    "top_p": "nothing is drawn by chance: send 1, or leave it out",
    "n": "there is one answer: send 1, or leave it out",
    "presence_penalty": "answers are the model's own: send 0, or leave it out",
    "frequency_penalty": "answers are the model's own: send 0, or leave it out",
    "logit_bias": "answers are the model's own: leave it out",
    "logprobs": "probabilities are not told: send false, or leave it out",
    "top_logprobs": "probabilities are not told: leave it out",
    "tools": "there are no tools: leave it out",
    "tool_choice": "there are no tools: send none, or leave it out",
    "tool_calls": "there are no tools: leave it out",
    "functions": "there are no functions: leave it out",
    "function_call": "there are no functions: send none, or leave it out",
    "response_format": "answers are plain text: leave it out",
    "modalities": "answers are plain text: leave it out",
    "audio": "answers are plain text: leave it out",
    "refusal": "no answer here is a refusal: leave it out",
    "annotations": "answers are plain text: leave it out",
    "prediction": "answers are not predicted: leave it out",
    "reasoning_effort": "answers come without reasoning: send none, or leave it out",
    "verbosity": "answers are as long as the adapter was trained to give them: send medium, or leave it out",
    "web_search_options": "nothing is searched for: leave it out",
    "store": "nothing is stored: send false, or leave it out",
    "include_obfuscation": "events are sent as they are: send false, or leave it out",
    "detail": "images are shown as the adapter was trained: send auto, or leave it out",
}


def release_frames(*errors: BaseException) -> None:
    """Drop the tracebacks of errors that were answered, and of those that led to them.

    A traceback holds frames, and one of their variables the error: such a circle, and with it the body and the images
    of the request, would stay until a full garbage collection, which is rare beside a model.
    """
    left: list[BaseException | None] = [*errors]
    while left:
        if (error := left.pop()) is not None and error.__traceback__ is not None:
            error.__traceback__ = None
            left += [error.__cause__, error.__context__]


def to_request_error(error: Exception) -> RequestError:
    """Return an error for the client: its own fault with what to do, a fault of the server without internal details."""
    match error:
        case RequestError():
            return error
        case DataError():
            message = str(error).removeprefix("row request: ")  # there is one, so nothing has to say which
            return RequestError(message, status=400, code="invalid_messages", param="messages")
        case NotFoundError() | YankedError():
            _log.info("%s", error)  # it names other adapters, and where the registry is
            message = "There is no such adapter or version, or it is withdrawn: /v1/models lists what may be asked."
            return RequestError(message, status=404, code="model_not_found", param="model")
        case StoreError():
            _log.error("the registry cannot be read: %s", error)
            message = "The registry of adapters cannot be read now. Try again later."
            return RequestError(message, status=503, code="registry_unavailable", param="model", retry_after=5)
        case AdapterError():
            _log.error("an adapter cannot be loaded: %s", error)
            message = f"The adapter cannot be loaded here ({type(error).__name__}). Whoever runs the server sees why."
            return RequestError(message, status=503, code="adapter_unavailable", param="model", retry_after=60)
    id = uuid4().hex
    _log.error("internal error %s", id, exc_info=error)
    message = f"Internal error. Whoever runs the server finds it in its log under {id}."
    return RequestError(message, status=500, code="internal_error")


def invalid_request(error: ValidationError) -> RequestError:
    """Return the first fault in the body of a request, and the field that has it."""
    # Where a field may have several forms, each of them says what it misses: the one that was meant goes deepest, and
    # finds no other type.
    faults = error.errors(include_url=False, include_context=False)
    fault = max(faults, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    if fault["type"] == "json_invalid":
        return RequestError(f"The body is not JSON: {fault['msg']}.", status=400, code="invalid_json")
    fields = _fields(fault["loc"])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fields).lstrip(".") or None
    name = str(fields[-1]) if fields else "body"
    if name in NOT_DONE:
        return RequestError(f"{param}: {NOT_DONE[name]}.", status=400, code="unsupported_value", param=param)
    if fault["type"] == "extra_forbidden":
        return RequestError(
            f"Unrecognized request argument: {brief(param)}.", status=400, code="unknown_parameter", param=param
        )
    return RequestError(
        f"{param or 'The body'}: {fault['msg']}; got {brief(fault['input'])}.",
        status=400,
        code="invalid_value",
        param=param,
    )


def _fields(loc: tuple[int | str, ...]) -> list[int | str]:
    """Return the fields that lead to a fault, without the names that pydantic gives to the forms of a field."""
    fields: list[int | str] = []
    for place, part in enumerate(loc):
        names_a_form = isinstance(part, str) and (
            not part.isidentifier() or part == "str" or (place > 0 and isinstance(loc[place - 1], int))
        )
        if not names_a_form:
            fields.append(part)
    return fields


def body_of(error: RequestError) -> ErrorBody:
    """Return the body of an error."""
    match error.status:
        case 429:
            kind = "rate_limit_error"
        case status if status >= 500:
            kind = "server_error"
        case 401:
            kind = "authentication_error"
        case 403:
            kind = "permission_error"
        case _:
            kind = "invalid_request_error"
    return ErrorBody(error=ErrorDetail(message=str(error), type=kind, param=error.param, code=error.code))


def response_of(error: RequestError, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the response for an error.

    Args:
        error: the error.
        headers: additional headers; None for none.
    """
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error).model_dump(), status_code=error.status, headers=headers)

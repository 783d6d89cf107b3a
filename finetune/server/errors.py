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

# Fields that the server does not support: the values that it accepts, and why no other.
_OMITTED = "null or omitted"
NOT_DONE = {
    "temperature": (f"0, 1, {_OMITTED}", "the server decodes greedily, as adapters are evaluated"),
    "top_p": (f"1, {_OMITTED}", "the server decodes greedily and samples nothing"),
    "n": (f"1, {_OMITTED}", "a request has one answer"),
    "presence_penalty": (f"0, {_OMITTED}", "the server changes no probabilities of the model"),
    "frequency_penalty": (f"0, {_OMITTED}", "the server changes no probabilities of the model"),
    "logit_bias": (_OMITTED, "the server changes no probabilities of the model"),
    "logprobs": (f"false, {_OMITTED}", "the server returns no probabilities"),
    "top_logprobs": (_OMITTED, "the server returns no probabilities"),
    "tools": (_OMITTED, "the server has no tools"),
    "tool_choice": (f"none, {_OMITTED}", "the server has no tools"),
    "tool_calls": (_OMITTED, "the server has no tools"),
    "functions": (_OMITTED, "the server has no functions"),
    "function_call": (f"none, {_OMITTED}", "the server has no functions"),
    "response_format": (_OMITTED, "answers are plain text"),
    "modalities": (_OMITTED, "answers are plain text"),
    "audio": (_OMITTED, "answers are plain text"),
    "refusal": (_OMITTED, "no answer of the server is a refusal"),
    "annotations": (_OMITTED, "answers are plain text"),
    "prediction": (_OMITTED, "the server does not use a predicted answer"),
    "reasoning_effort": (f"none, {_OMITTED}", "answers have no reasoning"),
    "verbosity": (f"medium, {_OMITTED}", "the adapter's training decides the length of answers"),
    "web_search_options": (_OMITTED, "the server does not search the web"),
    "store": (f"false, {_OMITTED}", "the server stores no answers"),
    "include_obfuscation": (f"false, {_OMITTED}", "the server sends events without padding"),
    "detail": (f"auto, {_OMITTED}", "the adapter's training decides the size of images"),
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
    """Return an error for the client: for its own mistakes what to do, for others no internal details."""
    match error:
        case RequestError():
            return error
        case DataError():
            message = str(error).removeprefix("row request: ")  # a request has one row, so its id is of no use
            return RequestError(message, status=400, code="invalid_messages", param="messages")
        case NotFoundError() | YankedError():
            _log.info("%s", error)  # not for the client: it names other adapters, and the place of the registry
            message = "The adapter or version in `model` does not exist, or is yanked. GET /v1/models lists others."
            return RequestError(message, status=404, code="model_not_found", param="model")
        case StoreError():
            _log.error("the server cannot read the registry: %s", error)
            message = "The server cannot read the registry of adapters now. Try again later."
            return RequestError(message, status=503, code="registry_unavailable", param="model", retry_after=5)
        case AdapterError():
            _log.error("the server cannot load an adapter: %s", error)
            message = f"The server cannot load the adapter ({type(error).__name__}). The reason is in the server's log."
            return RequestError(message, status=503, code="adapter_unavailable", param="model", retry_after=60)
    id = uuid4().hex
    _log.error("internal error %s", id, exc_info=error)
    message = f"The server failed. The operator finds the reason in the server's log under the id {id}."
    return RequestError(message, status=500, code="internal_error")


def invalid_request(error: ValidationError) -> RequestError:
    """Return the error for the first fault in the body of a request, with the field that has it."""
    # A field of several forms has a fault for each form. The client meant the form whose fault lies deepest, and
    # whose type fits.
    faults = error.errors(include_url=False, include_context=False)
    fault = max(faults, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    if fault["type"] == "json_invalid":
        return RequestError(f"The body must be JSON. {fault['msg']}.", status=400, code="invalid_json")
    fields = _fields(fault["loc"])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fields).lstrip(".") or None
    name = str(fields[-1]) if fields else "body"
    if name in NOT_DONE:
        allowed, reason = NOT_DONE[name]
        message = f"{param} must be {allowed}, got {brief(fault['input'])}: {reason}."
        return RequestError(message, status=400, code="unsupported_value", param=param)
    if fault["type"] == "extra_forbidden":
        return RequestError(
            f"Unrecognized request argument: {brief(param)}. Remove it.",
            status=400,
            code="unknown_parameter",
            param=param,
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


def stopping() -> RequestError:
    """Return the error for a request that the server cannot finish before it stops."""
    return RequestError("The server is stopping. Try again in 5 seconds.", status=503, code="stopping", retry_after=5)


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

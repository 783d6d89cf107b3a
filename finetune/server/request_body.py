"""The body of a request: its limits, and its parsing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from finetune.errors import RequestError
from finetune.server.errors import invalid_request
from finetune.server.schema import ChatRequest

if TYPE_CHECKING:
    from finetune.server.settings import Settings

MOST_STRINGS = 20_000  # of a body, with the names of fields; 1000 messages have some 5000
MOST_COMMAS = 1_000_000  # of a body; texts contain commas too


def parse_request(body: bytes, settings: Settings) -> ChatRequest:
    """Return the request in a body.

    Raises:
        RequestError: the request is not valid, or the server does not support it.
    """
    _refuse_many_values(body)
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from None
    for name in ("max_completion_tokens", "max_tokens"):
        wanted = getattr(request, name)
        if wanted is not None and wanted > settings.max_new_tokens:
            raise RequestError(
                f"{name} must be at most {settings.max_new_tokens}, got {wanted}.",
                status=400,
                code="invalid_value",
                param=name,
            )
    if request.max_completion_tokens is not None and request.max_tokens is not None:
        message = "Send either max_tokens or max_completion_tokens, got both: they are two names of one limit."
        raise RequestError(message, status=400, code="invalid_value", param="max_tokens")
    if request.stream_options is not None and request.stream_options.include_usage and not request.stream:
        message = "stream_options.include_usage needs stream: true. Remove it: a whole answer always has its usage."
        raise RequestError(message, status=400, code="invalid_value", param="stream_options")
    return request


def _refuse_many_values(body: bytes) -> None:
    """Refuse a body with too many values, because no other thread runs while the body is parsed.

    Raises:
        RequestError: the body has too many values.
    """
    # A quote inside a text is written \\". After an escaped backslash, a quote looks so but ends the text: the
    # quote at its beginning still counts.
    num_strings = (body.count(b'"') - body.count(b'\\"')) // 2
    num_commas = body.count(b",")
    if num_strings > MOST_STRINGS or num_commas > MOST_COMMAS:
        message = (
            f"The body may have at most {MOST_STRINGS} texts and names and {MOST_COMMAS} commas, got {num_strings} and "
            f"{num_commas}. Send fewer messages."
        )
        raise RequestError(message, status=400, code="too_many_values")

"""The OpenAPI schema, which describes the interface to programs and holds for every answer."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi

from finetune.server.schema import ChatCompletionChunk, ChatRequest, ErrorBody

if TYPE_CHECKING:
    from fastapi import FastAPI

_SCHEMAS = "#/components/schemas/{model}"
# The server parses the body in a thread of its own, so FastAPI does not know its schema: it is given here.
BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": _SCHEMAS.format(model="ChatRequest")}}},
}
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {
            "anyOf": [
                {"const": "[DONE]"},
                *(
                    {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": {"$ref": _SCHEMAS.format(model=name)},
                    }
                    for name in ("ChatCompletionChunk", "ErrorBody")
                ),
            ]
        }
    },
}
EVENTS = {
    "description": "The answer; with `stream: true` as server-sent events, each a ChatCompletionChunk, then [DONE].",
    "content": {"text/event-stream": {"schema": _EVENT}},
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the descriptions of the errors that a client may get instead of an answer."""
    retry = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds to wait."}}
    return {
        status: {
            "model": ErrorBody,
            "description": HTTPStatus(status).phrase,
            **({"headers": retry} if status in (429, 503) else {}),
        }
        for status in statuses
    }


def describe(app: FastAPI) -> None:
    """Give an application its schema."""
    schema = get_openapi(title=app.title, version="1", routes=app.routes)
    components = schema["components"]
    for model in (ChatRequest, ChatCompletionChunk):
        described = model.model_json_schema(ref_template=_SCHEMAS)
        components["schemas"] |= described.pop("$defs") | {model.__name__: described}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # a path may be any text
            if "401" in operation["responses"]:
                operation["security"] = [{"key": []}, {}]  # {}: the server may run without keys
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    app.openapi = lambda: schema  # type: ignore[method-assign]  # FastAPI's own way to another schema

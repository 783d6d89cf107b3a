"""A service: it answers a question about an image, by the adapter that the request names.

    APP_BASE=pocket APP_ADAPTERS=medical/phantoms@prod,retail/products \
        uvicorn --app-dir docs/examples fastapi_app:app
    curl --data-binary @scan.png 'http://127.0.0.1:8000/ask?question=Is+there+a+lesion?&adapter=medical/phantoms@prod'
    curl -N --data-binary @scan.png 'http://127.0.0.1:8000/stream?question=Is+there+a+lesion?'

`finetune serve` is a complete server, with keys, limits and batches of requests.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import iterate_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

import finetune
from finetune.errors import DataError
from finetune.serving.streaming import TextStream

MAX_BYTES = 10 * 1024 * 1024  # of an image


@asynccontextmanager
async def lifespan(app: FastAPI):
    """Load the base and all adapters before the first request, and list the allowed names."""
    app.state.adapters = os.environ["APP_ADAPTERS"].split(",")
    app.state.vlm = finetune.load("base", base=os.environ["APP_BASE"])
    for ref in app.state.adapters:
        app.state.vlm.add(ref)
    yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(DataError)
def unusable(request: Request, error: DataError) -> JSONResponse:
    """Answer a request whose image is invalid with the error."""
    return JSONResponse({"detail": str(error)}, status_code=400)


async def read_image(request: Request) -> bytes:
    """Return the request's body, of at most ``MAX_BYTES``."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_BYTES:
            raise HTTPException(413, f"an image has at most {MAX_BYTES} bytes")
    return bytes(data)


def read_adapter(request: Request, adapter: str | None = None) -> str | None:
    """Return an adapter's name, None for the plain base; only listed names, since another could be a folder."""
    if adapter is not None and adapter not in request.app.state.adapters:
        raise HTTPException(404, f"no adapter {adapter!r}; there are {', '.join(request.app.state.adapters)}")
    return adapter


Image = Annotated[bytes, Depends(read_image)]
Adapter = Annotated[str | None, Depends(read_adapter)]


# Functions that are not async: FastAPI runs each in a thread, so that an answer delays no other request.
@app.post("/ask")
def ask(request: Request, image: Image, adapter: Adapter, question: str) -> dict[str, str]:
    """Return the whole answer."""
    with request.app.state.vlm.using(adapter) as vlm:
        return {"answer": vlm.ask(image, question)}


@app.post("/stream")
def stream(request: Request, image: Image, adapter: Adapter, question: str) -> StreamingResponse:
    """Stream the answer; it ends early if the client disconnects."""
    with request.app.state.vlm.using(adapter) as vlm:
        return StreamingResponse(pieces(vlm.stream(image, question)), media_type="text/plain")


async def pieces(answer: TextStream) -> AsyncIterator[str]:
    """Yield the pieces, read in other threads; the answer ends with its reader."""
    with answer:
        async for piece in iterate_in_threadpool(answer):
            yield piece

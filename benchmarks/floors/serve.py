"""Load a base and answer chat completions over HTTP: BASE NUM_TOKENS."""

import base64
import io
import socket
import sys
from typing import Any

import uvicorn
from fastapi import Body, FastAPI
from PIL import Image

from benchmarks.floors.answering import Answering

app = FastAPI()


@app.post("/v1/chat/completions")
def complete(body: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008
    """Answer the question about the image of a request."""
    text, image = body["messages"][0]["content"]
    data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    answer = app.state.base.answer(Image.open(io.BytesIO(data)), text["text"], num_tokens=app.state.num_tokens)
    return {"choices": [{"message": {"role": "assistant", "content": answer}}]}


if __name__ == "__main__":
    app.state.base, app.state.num_tokens = Answering(sys.argv[1]), int(sys.argv[2])
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"serving on http://127.0.0.1:{listener.getsockname()[1]}/v1", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])

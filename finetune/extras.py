"""What is installed only where it is asked for: which extra of this package brings which library."""

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.errors import MissingExtraError

_EXTRA_OF = {
    "torch": "torch",
    "torchvision": "torch",
    "transformers": "torch",
    "peft": "torch",
    "accelerate": "torch",
    "datasets": "torch",
    "bitsandbytes": "torch",
    "PIL": "torch",
    "obstore": "object-store",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "gradio": "app",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "gguf": "gguf",
}


@contextmanager
def missing_extras_named() -> Iterator[None]:
    """Says, where a library is missing inside the ``with`` block, which extra brings it.

    Raises:
        MissingExtraError: a library of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise MissingExtraError(
            f"this needs {error.name}, which is not installed: pip install 'finetune-vlm[{extra}]'"
        ) from error

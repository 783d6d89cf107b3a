"""The optional extras of this package, and the libraries that each of them brings."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from finetune.errors import MissingExtraError

LIBRARIES = {
    "torch": ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "PIL"),
    "object-store": ("obstore",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "app": ("gradio",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "gguf": ("gguf",),
}


def require_extra(extra: str, *, what: str) -> None:
    """Check that the libraries of an extra are installed, without importing them.

    Args:
        extra: the name of the extra, one of ``LIBRARIES``.
        what: the name of the part that needs them, for the message.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    if missing := [name for name in LIBRARIES[extra] if find_spec(name) is None]:
        raise _error(what, missing, extra)


@contextmanager
def missing_extras_named() -> Iterator[None]:
    """Name the extra in the error where a library is missing inside the ``with`` block.

    Raises:
        MissingExtraError: a library of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        for extra, libraries in LIBRARIES.items():
            if library in libraries:
                raise _error("this part of finetune", [library], extra) from error
        raise


def _error(what: str, missing: list[str], extra: str) -> MissingExtraError:
    return MissingExtraError(
        f"{what} needs {', '.join(missing)}, not installed for {sys.executable}. "
        f"Run: pip install 'finetune-vlm[{extra}]'"
    )

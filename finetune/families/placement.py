"""The device and the dtype of a base."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from finetune.errors import ModelError

DTYPES = ("float32", "bfloat16", "float16")


def pick_device(wanted: str = "auto") -> str:
    """Return ``wanted`` with its index, or for ``auto`` the best device of this machine.

    Raises:
        ModelError: this machine has no such device.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=wanted).device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0]
        raise ModelError(
            f"device must be available on this machine, got {wanted!r}: {why}. Give auto or cpu."
        ) from None


def pick_dtype(wanted: str, path: str, *, revision: str | None = None) -> str:
    """Return ``wanted``, or for ``auto`` the dtype in a base's config, or float32 if the config has none.

    Args:
        wanted: the dtype, one of ``DTYPES``, or ``auto``.
        path: the folder or hub id of the base.
        revision: the revision of the hub id.

    Raises:
        ModelError: the dtype is not one of ``DTYPES``.
    """
    dtype = wanted
    if wanted == "auto":
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        stated = config.dtype or config.get_text_config().dtype
        dtype = str(stated or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        where = " in its config. Give another dtype" if wanted == "auto" else ""
        raise ModelError(f"{path}: dtype must be auto, or one of {', '.join(DTYPES)}, got {dtype!r}{where}")
    return dtype

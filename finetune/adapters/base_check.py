"""A check that a base can be loaded, from its files alone. Imports no torch, so a wrong name fails at once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.base_identity import weight_files
from finetune.core import lfs
from finetune.errors import ModelError, brief
from finetune.lookup import did_you_mean
from finetune.model_types import generic_model_types
from finetune.plugins import is_known, names
from finetune.tables import EMBEDDED_BASES

if TYPE_CHECKING:
    from collections.abc import Iterable

HUB_SECONDS = 5.0  # time limit for the hub to answer
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_CHECKED_FOR_POINTERS = ("*.json", "*.model", "*.jinja")


def check_base(name_or_path: str, *, revision: str | None = None) -> None:
    """Check that a base exists, is a model of a supported type, and is complete on disk.

    No weight is read. For a hub id that is not in the cache, one request asks the hub for a header; it takes at most
    ``HUB_SECONDS``.

    Args:
        name_or_path: the name of an embedded base, a folder, or a hub id.
        revision: the revision of a hub id.

    Raises:
        ModelError: the base cannot be loaded; the message states what is missing and what to give.
    """
    if name_or_path in EMBEDDED_BASES:
        return
    path = Path(name_or_path)
    if path.is_dir():
        _check_folder(path)
    elif path.exists():
        raise ModelError(
            f"a base must be a folder with config.json and weights, got the file {name_or_path}. Give its folder."
        )
    elif not _HUB_ID.fullmatch(name_or_path):
        raise ModelError(
            f"no model at {name_or_path!r}: there is no such folder{_from_here(path)}, and it is not a hub id "
            f"(NAMESPACE/NAME).{_nearest(path)} Embedded bases: {', '.join(EMBEDDED_BASES)}."
        )
    else:
        _check_hub(name_or_path, revision)


def refuse_pointer(path: Path) -> None:
    """Refuse a pointer to a file that Git LFS has not fetched.

    Raises:
        ModelError: the file is a pointer.
    """
    if lfs.is_pointer_file(path):
        raise ModelError(
            f"{path}: a Git LFS pointer and not the file itself. Run `git lfs pull` in {path.parent}, or download "
            "the model with `hf download`."
        )


def _check_folder(folder: Path) -> None:
    config_path = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} must not hold an adapter_config.json: transformers would silently load that adapter with the "
            "base. Give the folder of the plain base."
        )
    if not config_path.is_file():
        raise ModelError(
            f"{folder} must hold config.json, and does not. Give the folder of a model.{_models_below(folder)}"
        )
    try:
        for pattern in _CHECKED_FOR_POINTERS:
            for path in sorted(folder.glob(pattern)):
                refuse_pointer(path)
        _check_model_type(_read_json(config_path), str(folder))
        for path in weight_files(folder):
            _check_weights(path)
    except OSError as error:
        raise ModelError(f"{error.filename or folder} cannot be read: {error.strerror}. Check the file.") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}. Download the model again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, got {brief(value)}. Download the model again.")
    return value


def _check_model_type(config: dict[str, Any], source: str) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            f"{source}: config.json must have a model_type, got {brief(model_type)}. Give the folder of a model that "
            "transformers saved."
        )
    if is_known("families", model_type):
        return
    known, generic = names("families"), generic_model_types()
    if generic is not None and model_type not in generic:
        raise ModelError(
            f"{source}: model_type must be a vision-language model of transformers, got {model_type}."
            f"{did_you_mean(model_type, known)} Supported by name: {', '.join(known)}; and any other class of "
            "AutoModelForImageTextToText whose towers can be found."
        )


def _check_weights(path: Path) -> None:
    """Refuse a weight file that is shorter than its header states."""
    refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if size >= 8 + length else b""
    try:
        entries: Iterable[Any] = json.loads(header).items()
        end = max((entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"), default=0)
    except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError):
        raise ModelError(
            f"{path} must be a complete safetensors file, but its header cannot be read. Download the model again."
        ) from None
    if size < 8 + length + end:
        raise ModelError(
            f"{path} must have the {8 + length + end} bytes that its header describes, got {size}. The file is "
            "incomplete: download the model again."
        )


def _check_hub(name: str, revision: str | None) -> None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(f"no model at {name!r}: it is neither a folder nor a hub id: {_first_line(error)}") from None
    if isinstance(cached, str):
        _check_model_type(_read_json(Path(cached)), name)
        return
    hints = f"{_nearest(Path(name))}{_how_to_bring(name, revision)}"
    there = (
        f"There is no folder {name!r}{_from_here(Path(name))}, and the hub's cache on this machine has no such model"
    )
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"no model at {name!r}. {there} (HF_HUB_OFFLINE is set).{hints}")
    try:
        url = hf_hub_url(name, "config.json", revision=revision)
        get_hf_file_metadata(url, timeout=HUB_SECONDS)
    except GatedRepoError:
        raise ModelError(f"{name} is gated on the hub, and this account has no access.{hints}") from None
    except HfHubHTTPError as error:
        raise ModelError(f"no model at {name!r}. {there}; the hub answers: {_first_line(error)}{hints}") from None
    except OfflineModeIsEnabled:
        raise ModelError(f"no model at {name!r}. {there}.{hints}") from None
    except Exception as error:  # huggingface_hub passes on the errors of its HTTP library
        if not _is_network_error(error):
            raise
        raise ModelError(
            f"no model at {name!r}. {there}, and the hub could not be reached within {HUB_SECONDS:g} s "
            f"({_first_line(error)}).{hints}"
        ) from None


def _is_network_error(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(names & {"TransportError", "RequestException", "RequestError"})


def _how_to_bring(name_or_path: str, revision: str | None) -> str:
    """Return advice for a hub id that is not on this machine while the hub cannot be reached."""
    wanted = f" --revision {revision}" if revision else ""
    return (
        " If it is a hub id, run "
        f"`hf download {name_or_path}{wanted} --local-dir FOLDER` on a machine that reaches the hub. For a gated "
        "model, first accept its terms and run `hf auth login`. Copy FOLDER here, and set model.name_or_path=FOLDER."
    )


def _from_here(path: Path) -> str:
    return "" if path.is_absolute() else f" below {os.getcwd()}"


def _nearest(path: Path) -> str:
    """Return a hint with the folder or embedded base that the user probably meant."""
    parent = path.parent
    try:
        folders = [str(parent / one.name) for one in parent.iterdir() if one.is_dir()] if parent.is_dir() else []
    except OSError:
        folders = []
    return did_you_mean(path, [*EMBEDDED_BASES, *folders])


def _models_below(folder: Path) -> str:
    below = sorted(
        str(path.parent) for path in [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    )
    return f" Models below it: {', '.join(below[:5])}." if below else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Identify a base by the digests of its weight files and config; the cache keeps a digest until its file changes."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from finetune.adapters.manifest import BaseIdentity, ProcessorDigests, sha256_hex
from finetune.adapters.strict_json import canonical_json
from finetune.core.cache import cache_home, read_note, write_note
from finetune.core.file_state import file_key, is_settled
from finetune.errors import BaseMismatchError, ModelError, brief

# Keys of config.json about how the model was saved; its outputs do not depend on them.
_CONFIG_NOISE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
_WEIGHTS = "model.safetensors"
# The files of a base in a repository of the hub.
_NEEDED = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors"]
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "image_processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def snapshot_folder(name_or_path: str, *, revision: str | None = None) -> Path:
    """Return the local folder of a model's files: the folder itself, or its snapshot in the hub's cache.

    Files that the cache lacks are downloaded, unless ``HF_HUB_OFFLINE`` is set.

    Raises:
        ModelError: the files of a hub id are not on this machine and cannot be downloaded.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=_NEEDED))
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name_or_path} must be a folder or a hub id whose files are all in the hub's cache: {first_line} Give a "
            "folder, or run `hf download`."
        ) from None


def identify_base(name_or_path: str, *, revision: str | None = None, verify: str = "cached") -> BaseIdentity:
    """Return the identity of a base model.

    Args:
        name_or_path: a folder, or a hub id whose files are in the hub's cache.
        revision: the revision of the hub id.
        verify: ``cached`` reuses the digests of unchanged files; ``full`` reads every byte again.

    Raises:
        ModelError: the folder holds no safetensors weights or no config.
    """
    folder = snapshot_folder(name_or_path, revision=revision)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} must not hold an adapter_config.json: transformers would silently load that adapter with the "
            "base. Give the folder of the plain base."
        )
    weights = weight_files(folder)
    config = _config(folder)
    is_hub_id = not Path(name_or_path).is_dir()
    return BaseIdentity(
        model_type=str(config.get("model_type")),
        files={path.name: file_digest(path, cached=verify == "cached") for path in weights},
        config=_config_digest(config),
        hub_id=name_or_path if is_hub_id else None,
        revision=folder.name if is_hub_id else None,
    )


def refuse_other_base(wanted: BaseIdentity, folder: Path) -> None:
    """Refuse a base whose config or file names differ from those of ``wanted``; no weight is read.

    Raises:
        BaseMismatchError: the folder holds another base.
        ModelError: the folder holds no model.
    """
    config = _config(folder)
    # Hashing the weights takes long, so their digests are assumed here and checked when the base is loaded.
    files = {path.name: wanted.files.get(path.name, "0" * 64) for path in weight_files(folder)}
    live = BaseIdentity(model_type=str(config.get("model_type")), files=files, config=_config_digest(config))
    require_same_base(wanted, live)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} must hold config.json, and does not. Give the folder of a model.")
    config: dict[str, Any] = json.loads(path.read_bytes())
    return config


def _config_digest(config: dict[str, Any]) -> str:
    return sha256_hex(canonical_json({key: value for key, value in config.items() if key not in _CONFIG_NOISE}))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads: those of the index, or the single file.

    Raises:
        ModelError: the folder has no weight files, or lacks one of the index.
    """
    index = folder / f"{_WEIGHTS}.index.json"
    if index.is_file():
        weights = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        if missing := [path.name for path in weights if not path.is_file()]:
            raise ModelError(
                f"{folder} must hold the {len(weights)} weight files of its index, but {len(missing)} are missing, "
                f"such as {missing[0]}. Download the model again."
            )
        return weights
    if not (folder / _WEIGHTS).is_file():
        raise ModelError(
            f"{folder} must hold safetensors weights ({_WEIGHTS}), and does not. Save the model as safetensors: other "
            "formats are not loaded."
        )
    return [folder / _WEIGHTS]


def digest_beside_weights(name_or_path: str, *, revision: str | None = None, verify: str = "cached") -> str:
    """Return the SHA-256 over all files of a base and its processor, except the weights.

    Args:
        name_or_path: the same as for ``identify_base``.
        revision: the revision of the hub id.
        verify: the same as for ``identify_base``.
    """
    folder = snapshot_folder(name_or_path, revision=revision)
    patterns = [pattern for pattern in _NEEDED if not pattern.endswith(".safetensors")]
    files = sorted({path for pattern in (*patterns, "*/*.jinja") for path in folder.glob(pattern) if path.is_file()})
    cached = verify == "cached"
    return sha256_hex(canonical_json({str(p.relative_to(folder)): file_digest(p, cached=cached) for p in files}))


def identify_processor(name_or_path: str, *, revision: str | None = None, chat_template: str) -> ProcessorDigests:
    """Return the digests of tokenizer, processor config and chat template.

    Args:
        name_or_path: the folder or hub id that the processor was loaded from.
        revision: the revision of a hub id.
        chat_template: the chat template of the live processor.
    """
    folder = snapshot_folder(name_or_path, revision=revision)

    def digest_of(names: tuple[str, ...]) -> str:
        present = [folder / name for name in names if (folder / name).is_file()]
        return sha256_hex(canonical_json({path.name: sha256_hex(path.read_bytes()) for path in present}))

    return ProcessorDigests(
        tokenizer=digest_of(_TOKENIZER_FILES),
        processor_config=digest_of(_PROCESSOR_FILES),
        chat_template=sha256_hex(chat_template.encode()),
        generation_config=digest_of(("generation_config.json",)),
    )


def require_same_base(wanted: BaseIdentity, live: BaseIdentity) -> None:
    """Raise BaseMismatchError with the first difference, if the two are different bases."""
    if wanted.digest == live.digest and wanted.model_type == live.model_type:
        return
    if wanted.model_type != live.model_type:
        what = f"its model_type is {live.model_type}, not {wanted.model_type}"
    elif set(wanted.files) != set(live.files):
        what = f"its weight files are {brief(sorted(live.files), 300)}, not {brief(sorted(wanted.files), 300)}"
    elif wanted.files != live.files:
        name = next(name for name in sorted(wanted.files) if wanted.files[name] != live.files[name])
        what = f"{name} has sha256 {live.files[name][:16]}..., not {wanted.files[name][:16]}..."
    else:
        what = f"its config.json differs (digest {live.config[:16]}..., not {wanted.config[:16]}...)"
    raise BaseMismatchError(
        f"the adapter was trained on another base: {what}. Give the base with identity {wanted.digest[:16]}"
        f"{f' ({wanted.hub_id} at {wanted.revision})' if wanted.hub_id else ''}."
    )


def require_same_processor(wanted: ProcessorDigests, live: ProcessorDigests) -> None:
    """Raise BaseMismatchError with the first part of the processor that differs."""
    for part in ProcessorDigests.model_fields:
        if getattr(wanted, part) != getattr(live, part):
            raise BaseMismatchError(
                f"the adapter was trained with another {part.replace('_', ' ')} (digest "
                f"{getattr(live, part)[:16]}..., not {getattr(wanted, part)[:16]}...): its answers would change. Load "
                "the base with the processor files of the training."
            )


def file_digest(path: Path, *, cached: bool = True) -> str:
    """Return the SHA-256 of a file; with ``cached``, the digest in the cache if the file has not changed since.

    Raises:
        ModelError: the hub's cache holds the file under the digest of other bytes.
    """
    resolved = path.resolve()
    key = sha256_hex(file_key(resolved).encode(errors="surrogateescape"))
    settled = is_settled(resolved)  # after the key and before the bytes
    # The key is particular to this machine, since several machines may share the cache folder.
    note = cache_home() / "digests" / key
    digest = read_note(note) if cached and settled else None
    if digest is None:
        with resolved.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if settled:
            write_note(note, digest)
    if resolved.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", resolved.name) and digest != resolved.name:
        raise ModelError(
            f"{path}: the hub's cache must hold a large file under its SHA-256, but the bytes have another "
            f"({digest[:16]}...). The file was changed or damaged: delete {resolved} and download the model again."
        )
    return digest

"""Malicious or damaged adapters: changed copies of a good one, with valid digests."""

import hashlib
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from finetune.adapters.manifest import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, AdapterDescription
from finetune.adapters.peft_format import peft_config


class Forgery:
    """A copy of a good adapter's folder.

    What is left as it is goes with what was changed: digests always, and the config with the manifest.

    Attributes:
        folder: the copy.
        manifest: its manifest, as a dictionary to change.
        config: what to write in the place of the config that the manifest asks for.
        tensors: its weights, by name.
        weights: bytes to write in the place of a file of ``tensors``.
    """

    def __init__(self, good: Path, folder: Path):
        shutil.copytree(good, folder)
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_bytes())
        self.config: dict[str, Any] | bytes | None = None
        self.tensors = load_file(folder / WEIGHTS_NAME)
        self.weights: bytes | None = None

    @property
    def adapter(self) -> dict[str, Any]:
        return self.manifest["adapter"]

    @property
    def options(self) -> dict[str, Any]:
        """Of the first part."""
        return self.adapter["parts"][0]["options"]

    @property
    def modules(self) -> dict[str, list[str]]:
        """Of the first part."""
        return self.adapter["parts"][0]["modules"]

    def part(self, method: str) -> dict[str, Any]:
        return next(part for part in self.adapter["parts"] if part["method"] == method)

    def good_config(self) -> dict[str, Any]:
        return json.loads((self.folder / CONFIG_NAME).read_bytes())

    def list_tensors(self) -> None:
        """Make the manifest's table that of ``tensors``."""
        names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
        self.adapter["tensors"] = {
            name: {"shape": list(tensor.shape), "dtype": names[str(tensor.dtype)]}
            for name, tensor in self.tensors.items()
        }

    def rename(self, old: str, new: str, *, everywhere: bool = True) -> None:
        """Renames tensors, and with ``everywhere`` what the manifest says of them and of their modules."""
        self.tensors = {name.replace(old, new): tensor for name, tensor in self.tensors.items()}
        if everywhere:
            self.manifest["adapter"] = json.loads(json.dumps(self.adapter).replace(old, new))

    def header(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Changes the parsed header of the weights; their data stays."""

        def rewrite(text: bytes) -> bytes:
            header = json.loads(text)
            change(header)
            return json.dumps(header).encode()

        self.header_bytes(rewrite)

    def header_bytes(self, change: Callable[[bytes], bytes]) -> None:
        """Changes the bytes of the header."""
        data = self.plain_weights()
        length = struct.unpack("<Q", data[:8])[0]
        header = change(data[8 : 8 + length])
        self.weights = struct.pack("<Q", len(header)) + header + data[8 + length :]

    def plain_weights(self) -> bytes:
        return save(self.tensors, metadata={"format": "pt"})

    def write(self) -> None:
        """Write the three files, with the digests that they have."""
        if self.weights is None:
            self.weights = self.plain_weights()
        if self.config is None:
            # Of a description that is none, the config stays that of the good one.
            try:
                self.config = peft_config(AdapterDescription.model_validate(self.adapter))
            except (ValueError, LookupError, TypeError):
                self.config = self.good_config()
        config = self.config if isinstance(self.config, bytes) else json.dumps(self.config).encode()
        files = self.manifest.get("files")
        for name, data in ((WEIGHTS_NAME, self.weights), (CONFIG_NAME, config)):
            (self.folder / name).write_bytes(data)
            if isinstance(files, dict) and name in files:
                files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        (self.folder / MANIFEST_NAME).write_text(json.dumps(self.manifest))

    def manifest_text(self, change: Callable[[str], str | bytes]) -> None:
        """Changes the manifest's text once everything is written."""
        changed = change((self.folder / MANIFEST_NAME).read_text())
        data = changed if isinstance(changed, bytes) else changed.encode("utf-8", "surrogatepass")
        (self.folder / MANIFEST_NAME).write_bytes(data)


@dataclass(frozen=True)
class Case:
    """One forgery and how it is refused.

    Attributes:
        name: for people.
        forge: changes what is to be written.
        error: the class of the error, exactly.
        message: what its message matches.
        of: which good adapter is changed.
        after: changes the folder once it is written.
    """

    name: str
    forge: Callable[[Forgery], object]
    error: type[Exception]
    message: str
    of: str = "lora"
    after: Callable[[Forgery], object] = lambda forgery: None

    def make(self, good: Path, folder: Path) -> Path:
        forgery = Forgery(good, folder)
        self.forge(forgery)
        forgery.write()
        self.after(forgery)
        return folder


def names(case: Case) -> str:
    """The name under which pytest shows a case."""
    return case.name.replace(" ", "-")


def nothing(forgery: Forgery) -> None:
    """Changes nothing: the case is about what comes after."""


class Payload:
    """An object that writes ``canary`` when it is read from a pickle."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


def pickled(canary: Path) -> bytes:
    """Return a pickle that writes ``canary`` when it is read."""
    return pickle.dumps(Payload(canary))

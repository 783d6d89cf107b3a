"""Adapter folders that vLLM may load: every check that needs no live model, and a cache by digest."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapters.folder import config_bytes, verify, weights_bytes
from finetune.adapters.manifest import CONFIG_NAME, WEIGHTS_NAME, sha256_hex
from finetune.adapters.reference import AdapterRef
from finetune.adapters.requirements import require_usable
from finetune.adapters.strict_json import canonical_json
from finetune.core.cache import cache_home
from finetune.core.outside_text import safe_line
from finetune.core.system_errors import explain
from finetune.errors import IntegrityError, ManifestError
from finetune.export.vllm_rules import refuse_for_vllm, vllm_form
from finetune.serving.aliases import ALIAS_SECONDS, Aliases

if TYPE_CHECKING:
    from collections.abc import Mapping

    from finetune.adapters.manifest import AdapterManifest
    from finetune.registry import AdapterRegistry, Version
    from finetune.vllm_plugin.base import ServedBase

_log = logging.getLogger(f"vllm.{__name__}")


class ServedAdapters:
    """The adapters of a registry that fit a base, as folders; any thread may call any method.

    Args:
        registry: the registry in which references are looked up.
        base: the base that vLLM serves.
        alias_seconds: the number of seconds for which a resolved alias is reused. If the registry or the new version
            fails, the present version stays, with a warning.
    """

    def __init__(self, registry: AdapterRegistry, base: ServedBase, *, alias_seconds: float = ALIAS_SECONDS):
        self.registry, self.base = registry, base
        self._folders: dict[str, Path] = {}  # digest -> folder that this process made or checked
        self._making = threading.Lock()
        self._aliases = Aliases(self._look_up, registry.guard.check_manifest, seconds=alias_seconds)

    def pinned(self, ref: str) -> str:
        """Return the reference with the present digest of ``ref``, and make the folder of its version.

        Raises:
            AdapterReferenceError: ``ref`` is not a reference.
            RegistryError: the adapter does not exist, or the registry cannot be read.
            AdapterError: the adapter is damaged, is not trusted, or does not match the base.
            ExportError: vLLM cannot serve the adapter.
        """
        version = self._aliases.version(ref)
        self.registry.guard.check_manifest(version)  # its key may be revoked since
        return str(AdapterRef(namespace=version.namespace, name=version.name, digest=version.digest))

    def folder(self, pinned: str) -> Path:
        """Return the folder of an adapter whose reference has a digest.

        Raises:
            FinetuneError: as for ``pinned``.
        """
        return self._folders[self._aliases.version(pinned).digest]

    def _look_up(self, ref: str) -> Version:
        version = self.registry.resolve(ref)
        with self._making:
            if version.digest not in self._folders:
                if version.warning:
                    _log.warning("%s", safe_line(version.warning))
                self._folders[version.digest] = self._make(version)
        return version

    def _make(self, version: Version) -> Path:
        manifest, read = self.registry.read(version)
        self.base.require_same(manifest)
        require_usable(manifest)
        refuse_for_vllm(manifest, max_lora_rank=self.base.max_lora_rank)
        require_described(manifest)
        adapter = verify(manifest, read, digest=version.digest, source=Path(version.ref))
        tensors, config = vllm_form(adapter)
        files = {CONFIG_NAME: config_bytes(config), WEIGHTS_NAME: weights_bytes(tensors)}
        # The name has the digest of the files too, because another release may write the same adapter differently.
        made = sha256_hex(canonical_json({name: sha256_hex(data) for name, data in files.items()}))
        folder = cache_home() / "vllm" / f"{version.digest}-{made[:16]}"
        try:
            put_folder(folder, files)
        except OSError as error:
            raise explain(error, folder, verb="write", elsewhere=" ($FINETUNE_CACHE)") from error
        return folder


def require_described(manifest: AdapterManifest) -> None:
    """Check that the tensors of a LoRA match its modules and ranks; their widths need a live base.

    Raises:
        ManifestError: a tensor does not match; the message names the first.
    """
    (part,) = manifest.adapter.parts
    table, expected = manifest.adapter.tensors, set()
    for name in part.names:
        r = part.options["rank_pattern"].get(name, part.options["r"])
        for kind, axis in (("A", 0), ("B", 1)):  # A [r, I], B [O, r]
            tensor = f"base_model.model.{name}.lora_{kind}.weight"
            expected.add(tensor)
            shape = table[tensor].shape if tensor in table else []
            if len(shape) != 2 or shape[axis] != r:
                raise ManifestError(
                    f"{manifest.full_name}: {tensor} must have rank {r} as in its config, got shape {shape}"
                )
    if extra := sorted(set(table) - expected):
        raise ManifestError(
            f"{manifest.full_name}: every tensor must belong to a module of the adapter, got {extra[0]}"
        )


def put_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Create ``folder`` with exactly ``files``; several processes may do so at once, with the same files.

    The folder appears with all of its files. An existing folder is compared byte by byte, and never changed, because
    engines read it at any time.

    Raises:
        IntegrityError: the existing folder has other contents.
        OSError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
        try:
            for name, data in files.items():
                with (aside / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            aside.chmod(0o755)
            os.rename(aside, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    there = {path.name for path in folder.iterdir()}
    if there != set(files) or any((folder / name).read_bytes() != data for name, data in files.items()):
        raise IntegrityError(
            f"{folder} must hold the files of its adapter, but they have changed. Delete it; the server then makes it "
            "again."
        )

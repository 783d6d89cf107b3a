"""Checkpoints: folders of one safetensors and one JSON file, written whole or not at all, and checked when read.

::

    checkpoints/step-00000040/state.safetensors   every tensor
    checkpoints/step-00000040/checkpoint.json     everything else, with the digests of both

They hold the adapter and the state of its training, never the base.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors.torch import load as parse_safetensors

from finetune.adapters.folder import weights_bytes, write_folder
from finetune.adapters.manifest import sha256_hex
from finetune.adapters.strict_json import canonical_json, strict_json
from finetune.core.old_names import RUN, current_names
from finetune.errors import IntegrityError, ManifestError, TrainingError, brief
from finetune.recipe.differing import describe, differing, is_longer_only

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

SCHEMA = 1
TENSORS_NAME = "state.safetensors"
FACTS_NAME = "checkpoint.json"
MAX_FACTS_BYTES = 256 * 1024**2
_FACTS = {"step": int, "run": dict, "files": dict}  # the facts that this file reads
_NAME = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint of this run that was read and is undamaged."""

    path: Path
    step: int  # optimizer steps done
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    extended: bool = False  # True if it is of a run of another length, which continues


class Checkpoints:
    """The checkpoints of one run's folder.

    Args:
        folder: the folder that holds the checkpoints.
        run: the identity of the run as plain data (recipe, base, rows, processes); a checkpoint of another identity
            is refused.
        keep: the number of checkpoints that are kept, the newest ones.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], *, keep: int):
        self.folder, self.run, self.keep = folder, run, keep

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of ``step``."""
        return self.folder / f"step-{step:08d}"

    def write(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write a checkpoint, and then remove the oldest beyond ``keep``.

        Raises:
            OSError: the checkpoint could not be written, as on a full disk; earlier checkpoints are unchanged.
        """
        path, raw = self.path(step), weights_bytes(tensors)
        whole = {
            "schema": SCHEMA,
            "step": step,
            "run": self.run,
            **facts,
            "files": {TENSORS_NAME: {"sha256": sha256_hex(raw), "size": len(raw)}},
        }
        text = canonical_json({**whole, "digest": sha256_hex(canonical_json(whole))})
        write_folder(path, {TENSORS_NAME: raw, FACTS_NAME: text})
        _sync(path)
        _sync(self.folder)
        for _, old in self._listed()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def read(self, path: Path, *, extend: bool = False) -> Checkpoint:
        """Read one checkpoint of this run.

        Args:
            path: the folder of the checkpoint.
            extend: whether a checkpoint of the same run with another length is accepted.

        Raises:
            IntegrityError: the checkpoint is damaged: its bytes differ from those that were written.
            TrainingError: the checkpoint is of another run; the message names the differences.
        """
        facts = _facts(path)
        entry = facts["files"][TENSORS_NAME]
        raw = _bytes(path / TENSORS_NAME)
        if [len(raw), sha256_hex(raw)] != [entry.get("size"), entry.get("sha256")]:
            raise IntegrityError(
                f"{TENSORS_NAME} differs from the file that was written ({len(raw)} bytes, {entry.get('size')} written)"
            )
        if "images" in self.run and "images" not in facts["run"]:
            raise TrainingError(
                "another version of this package wrote it, without a record of the images. Continue the run with that "
                "version"
            )
        # Both, because a plug-in's source may have a key of its own with an earlier name.
        then, now = (
            current_names(run, RUN, source=FACTS_NAME, error=IntegrityError) for run in (facts["run"], self.run)
        )
        different = differing(then, now)
        other_length = is_longer_only(different.keys(), prefix="recipe.")
        extended = extend and other_length
        if different and not extended:
            hint = ". Set train.resume: extend to continue to the new length" if other_length else ""
            raise TrainingError(f"{describe(different)}{hint}")
        return Checkpoint(path=path, step=facts["step"], facts=facts, tensors=parse_safetensors(raw), extended=extended)

    def newest(self, log: Callable[[str], None], *, extend: bool = False) -> Checkpoint | None:
        """Return the newest checkpoint from which the run can continue, or None if there is no checkpoint.

        A checkpoint that is damaged or of another run is skipped, with a line about the reason. It is set aside once
        an older one is used.

        Args:
            log: the function that prints a line.
            extend: whether a checkpoint of the same run with another length is accepted.

        Raises:
            TrainingError: there are only checkpoints of other runs, and this run would overwrite one.
        """
        refused: list[Path] = []
        foreign: tuple[Path, str] | None = None
        found = None
        for _, path in reversed(self._listed()):
            try:
                found = self.read(path, extend=extend)
                break
            except IntegrityError as error:
                log(f"{path} is damaged and is not used: {error}")
            except TrainingError as error:
                foreign = foreign or (path, str(error))
                log(f"{path} is of another run and is not used: {error}")
            refused.append(path)
        if found is None and foreign:
            path, why = foreign
            raise TrainingError(
                f"{self.folder.parent} holds another unfinished run ({path.name}): {why}. To finish that run, start it "
                "with its own settings. To keep both runs, set another train.output_dir or name. To drop that run, set "
                "train.resume: never."
            )
        for path in refused:
            aside = path.with_name(f"{path.name}.refused")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        return found

    def clear(self) -> None:
        """Remove every checkpoint, and the unfinished files of a killed process."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove the unfinished files of a killed process."""
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _listed(self) -> list[tuple[int, Path]]:
        """Return (step, folder), oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted((int(match[1]), path) for path in self.folder.iterdir() if (match := _NAME.match(path.name)))


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = strict_json(
            _bytes(path / FACTS_NAME), source=FACTS_NAME, max_bytes=MAX_FACTS_BYTES, max_values=MAX_FACTS_BYTES
        )
    except ManifestError as error:
        raise IntegrityError(str(error)) from None
    if not isinstance(facts, dict):
        raise IntegrityError(f"{FACTS_NAME} must be a JSON object, got {brief(facts)}")
    digest = facts.pop("digest", None)
    if digest != sha256_hex(canonical_json(facts)):
        raise IntegrityError(f"{FACTS_NAME} does not match the digest in it")
    if facts.get("schema") != SCHEMA:
        raise IntegrityError(
            f"{FACTS_NAME}: schema must be {SCHEMA} for this version, got {brief(facts.get('schema'))}"
        )
    for key, kind in _FACTS.items():
        if type(facts.get(key)) is not kind:
            raise IntegrityError(f"{FACTS_NAME}: {key} must be of type {kind.__name__}, got {brief(facts.get(key))}")
    if not isinstance(facts["files"].get(TENSORS_NAME), dict):
        raise IntegrityError(f"{FACTS_NAME}: files must list {TENSORS_NAME}, got {brief(facts['files'])}")
    return facts


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path.name} cannot be read ({error.strerror})") from None


def _sync(folder: Path) -> None:
    """Write the names in ``folder`` to the disk, so that they survive a power cut; only POSIX can open a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The target ``merged``: a whole model, with the adapter in its weights, that transformers opens by itself."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig

from finetune.adapters.base_identity import require_same_processor, snapshot_folder, weight_files
from finetune.adapters.card import CARD_NAME, Card, model_card
from finetune.assemble.loading import load_base
from finetune.errors import ExportError
from finetune.export.output import require_space
from finetune.export.parity import ROUNDING, compare, outputs, rows_of
from finetune.export.snippets import transformers_code
from finetune.export.target import Comparison
from finetune.lookup import did_you_mean
from finetune.methods.adapter import merge
from finetune.tables import UNMERGEABLE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from finetune.adapters.manifest import AdapterManifest
    from finetune.assemble.base import Base
    from finetune.export.target import Source
    from finetune.interfaces import Update

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name -> torch's
_SIZE = re.compile(r"[1-9][0-9]*(KB|MB|GB|TB)")
# Files of the processor and of generation. They are copied, because older loaders do not find newly saved ones.
_PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_TEMPLATE_NAME = "chat_template.jinja"
_LOADING = """\
from transformers import {auto_class}, AutoProcessor

model = {auto_class}.from_pretrained("FOLDER")  # this one
processor = AutoProcessor.from_pretrained("FOLDER")"""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A target that writes the base's own class and files, with the adapter merged in fp32 and cast to ``dtype``.

    It takes the memory of one fp32 copy of the base: the merged model is freed before the written files are read back.

    Attributes:
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` for the dtype in which transformers loads the base,
            see ``own_dtype``.
        max_shard_size: the limit for the size of one file of weights, such as ``5GB``.
    """

    dtype: str = "auto"
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        if self.dtype not in (allowed := ("auto", *ROUNDING)):
            hint = did_you_mean(self.dtype, allowed)
            raise ExportError(f"dtype must be one of {', '.join(allowed)}, got {self.dtype!r}.{hint}")
        if not _SIZE.fullmatch(self.max_shard_size):
            raise ExportError(f"max_shard_size must be a size such as 5GB or 500MB, got {self.max_shard_size!r}")

    def refuse(self, manifest: AdapterManifest) -> None:
        """Check that the weights of the base can hold the adapter.

        Raises:
            ExportError: no weight can hold a part of the adapter.
        """
        for part in manifest.adapter.parts:
            if part.method in UNMERGEABLE:
                raise ExportError(
                    f"{manifest.full_name} cannot be merged: {UNMERGEABLE[part.method]}. Load it with "
                    "finetune.load(...)."
                )

    def make(self, source: Source, folder: Path) -> list[Comparison]:
        """Merge and cast, write model, processor and card, and load them like any base."""
        base, model, device = source.base, cast("Any", source.base.model), str(source.base.model.device)
        home = snapshot_folder(base.path, revision=base.identity.revision)
        dtype = own_dtype(home) if self.dtype == "auto" else self.dtype
        require_space(folder, sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize)
        untie(model, source.updates)
        before = _digests(model, dtype)
        merge(source.updates)
        after = _digests(model, dtype)
        changed = [name for name in after if after[name] != before[name]]
        if not changed:
            raise ExportError(
                f"{source.ref} changes no weight of its base in {dtype}, so the merged model would equal the base. "
                "Choose --dtype float32, or check that training changed the adapter."
            )
        merged = compare(
            "outputs of the model merged in float32 with those of the adapter on the base",
            outputs(base, source.rows),
            wanted=source.adapted,
            plain=source.plain,
        )
        if merged.verdict == "failed":
            return [merged]
        self._write(source, home, folder, dtype)
        model.to("meta")  # frees its memory
        written = load_base(str(folder), device=device)
        return [merged, _compare_weights(written.model, after, len(changed), dtype), _compare(source, written, dtype)]

    def _write(self, source: Source, home: Path, folder: Path, dtype: str) -> None:
        model: Any = source.base.model.to(getattr(torch, dtype))
        # The base's own is copied with the processor, and transformers may refuse to save it.
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(folder, max_shard_size=self.max_shard_size)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"transformers cannot save this {type(model).__name__}: {reason}") from error
        (folder / "generation_config.json").unlink(missing_ok=True)
        for name in _PROCESSOR_FILES:
            if (home / name).is_file():
                shutil.copyfile(home / name, folder / name)
        template = source.base.processor.chat_template  # that of the family, if the base has none
        if template and not any((folder / name).exists() for name in (_TEMPLATE_NAME, "chat_template.json")):
            (folder / _TEMPLATE_NAME).write_text(str(template), encoding="utf-8")
        (folder / CARD_NAME).write_text(model_card(source.manifest, _card(source, dtype)), encoding="utf-8")


def _card(source: Source, dtype: str) -> Card:
    return Card(
        version=source.version,
        digest=source.adapter.digest,
        relation="finetune",
        library_name="transformers",
        loading=transformers_code(source, _LOADING.format(auto_class=source.base.family.auto_class.__name__)),
        checks=f"Merged in float32, written in {dtype}. `export.json` lists what was compared before the folder was "
        "declared good, and with which versions.",
    )


def untie(model: PreTrainedModel, updates: Mapping[str, Update]) -> None:
    """Give each changed module a weight of its own, if another module shares it.

    The config then has no tied weights, because a load would tie them again.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    for update in updates.values():
        for leaf, parameter in update.module.named_parameters(recurse=False):
            if len(owners[id(parameter)]) > 1:
                setattr(update.module, leaf, nn.Parameter(parameter.detach().clone(), requires_grad=False))
                for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
                    if getattr(config, "tie_word_embeddings", False):
                        config.tie_word_embeddings = False


def own_dtype(home: Path) -> str:
    """Return the dtype in which transformers loads a base: that of its config, else that of most values in its files.

    The two differ if the files were made smaller for the download: a load of such a base uses that of the config.
    """
    config = AutoConfig.from_pretrained(home, trust_remote_code=False)
    stated = str(config.dtype or config.get_text_config().dtype or "").removeprefix("torch.")
    if stated in ROUNDING:
        return stated
    counts: Counter[str] = Counter()
    for path in weight_files(home):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                counts[part.get_dtype()] += prod(part.get_shape())
    return next((_DTYPES[dtype] for dtype, _ in counts.most_common() if dtype in _DTYPES), "float32")


def _digests(model: nn.Module, dtype: str) -> dict[str, str]:
    """Return the digest of each weight and buffer in ``dtype``, read as fp32."""
    return {name: _digest(tensor, name, getattr(torch, dtype)) for name, tensor in model.state_dict().items()}


def _digest(tensor: Tensor, name: str, dtype: torch.dtype) -> str:
    if tensor.is_floating_point():
        tensor = tensor.to(dtype).float()
        if not tensor.isfinite().all():
            raise ExportError(
                f"{name}: every value must be finite in {dtype}, and some are not. Choose --dtype bfloat16 or float32."
            )
    return hashlib.sha256(tensor.cpu().contiguous().numpy().data).hexdigest()


def _compare_weights(model: nn.Module, wanted: dict[str, str], num_changed: int, dtype: str) -> Comparison:
    got = _digests(model, dtype)
    wrong = [name for name in wanted.keys() | got.keys() if got.get(name) != wanted.get(name)]
    what = f"the {len(wanted)} weights that transformers loads with those merged, {num_changed} of them changed"
    if wrong:
        what += f"; {len(wrong)} differ, such as {min(wrong)}"
    difference = float("inf") if wrong else 0.0
    return Comparison(what=what, verdict="failed" if wrong else "passed", largest_difference=difference, tolerance=0.0)


def _compare(source: Source, written: Base, dtype: str) -> Comparison:
    """Compare outputs of the loaded model, with its own processor, for the same conversations."""
    require_same_processor(source.manifest.processor, written.digests)
    got = outputs(written, rows_of(written, source.manifest.probe))
    what = f"outputs of the loaded model, its weights rounded to {dtype}, with those of the adapter on the base"
    if dtype == "float32":
        what = "outputs of the loaded model with those of the adapter on the base"
    found = compare(what, got, wanted=source.adapted, plain=source.plain, rounding=ROUNDING[dtype])
    if dtype != "float32" and found.verdict == "inconclusive":
        raise ExportError(
            f"Rounding to {dtype} changes outputs by {found.largest_difference:.3g}, and {source.ref} by at most "
            f"{found.effect:.3g}, so outputs cannot show its effect. Choose --dtype float32."
        )
    return found

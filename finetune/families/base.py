"""The base class of all families, for loading and towers, and the lookup of a model's family."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from finetune.errors import ModelError, PluginError
from finetune.families.attention import load_with_attention
from finetune.families.quantization import check_quantized, keep_trainable, quantization_config
from finetune.lookup import did_you_mean, import_string
from finetune.plugins import find, is_known, names
from finetune.tables import EMBEDDED_BASES, GENERIC_FAMILY

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.interfaces import ModelFamily, Towers
    from finetune.recipe import AttnImplementation, Quantization


class Family:
    """The base class of families of any architecture."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    media: ClassVar[frozenset[str]] = frozenset({"image"})
    tower_paths: ClassVar[Towers]
    auto_class: ClassVar[Any]  # transformers' own that loads its models

    def load(
        self,
        name_or_path: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        quantization: Quantization | None = None,
        attn_implementation: AttnImplementation = "auto",
    ) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Return the frozen model in eval mode on ``device``, and its processor.

        Raises:
            ModelError: it cannot be loaded, or cannot be quantized, or attend as wanted, on this device.
        """
        extra: dict[str, Any] = {}
        if quantization is not None:
            kept = self._unquantized(name_or_path, revision)
            extra = {"quantization_config": quantization_config(quantization, dtype, kept), "device_map": device}
        try:
            load = partial(
                self.auto_class.from_pretrained,
                name_or_path,
                revision=revision,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                use_safetensors=True,
                **extra,
            )
            model: Any = load_with_attention(load, attn_implementation, name_or_path, device=device)
            processor = AutoProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelError(f"{name_or_path}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        self.check_processor(processor, name_or_path)
        model.requires_grad_(False)
        if quantization is None:
            model.to(device)
        else:
            keep_trainable(model)
            check_quantized(model, self.towers(model))
        return model.eval(), processor

    def check_processor(self, processor: ProcessorMixin, name_or_path: str) -> None:
        """Complete a processor, or raise ModelError where it cannot be used."""

    def towers(self, model: nn.Module) -> Towers:
        """Return ``tower_paths`` after checking that the model has them."""
        names = {name for name, _ in model.named_modules()}
        for tower, paths in self.tower_paths.items():
            for path in paths:
                if path not in names:
                    raise ModelError(
                        f"{type(model).__name__} has no module {path!r}, where {self.model_type} keeps its "
                        f"{tower} tower.{did_you_mean(path, names)}"
                    )
        return self.tower_paths

    def skeleton(self, name_or_path: str, *, revision: str | None = None) -> PreTrainedModel:
        """Return the model as its config describes it, on the meta device: names and shapes, and no weights."""
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
            return self.auto_class.from_config(config, trust_remote_code=False)

    def _unquantized(self, name_or_path: str, revision: str | None) -> list[str]:
        """Return the full paths of the modules that stay in 16 or 32 bit: all but the language tower.

        Raises:
            ModelError: there is no language tower.
        """
        towers = self.towers(self.skeleton(name_or_path, revision=revision))
        if "language" not in towers:
            raise ModelError(
                f"{name_or_path}: only a language tower can be quantized, and this base has {', '.join(towers)}. Set "
                "quantization to null."
            )
        return [path for tower, paths in towers.items() if tower != "language" for path in paths] + ["lm_head"]


def embedded_path(name_or_path: str) -> str:
    """Return the folder of a base that comes with the package, and any other name unchanged."""
    target = EMBEDDED_BASES.get(name_or_path)
    return str(import_string(target)()) if target else name_or_path


def family_of(name_or_path: str, *, revision: str | None = None) -> ModelFamily:
    """Return the family of a model by its config's ``model_type``.

    Raises:
        ModelError: there is no such model, or no family for it.
    """
    try:
        # A plug-in tells transformers of its classes when it is imported.
        stated = str(PreTrainedConfig.get_config_dict(name_or_path, revision=revision)[0].get("model_type"))
        family = find("families", stated, what="model_type") if is_known("families", stated) else None
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, PluginError):
            raise
        if "model type" in str(error):
            raise ModelError(f"{name_or_path}: {str(error).strip().splitlines()[0]}") from None
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no model at {name_or_path!r}: {first_line} Give a folder, a hub id, or one of the embedded bases: "
            f"{', '.join(EMBEDDED_BASES)}."
        ) from None
    if family is not None:
        return family()
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return import_string(GENERIC_FAMILY.target)(config.model_type)
    raise ModelError(
        f"{name_or_path}: {config.model_type} is no vision-language model that transformers knows. Supported by name: "
        f"{', '.join(names('families'))}; and any other class of AutoModelForImageTextToText whose towers can be found."
    )

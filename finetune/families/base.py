"""The base class of all families, which loads models and finds towers, and the lookup of a model's family."""

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
    auto_class: ClassVar[Any]  # class of transformers that loads the models

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
            ModelError: the model cannot be loaded, quantized, or given this attention on this device.
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
        """Complete a processor, or raise ModelError if it cannot be used."""

    def towers(self, model: nn.Module) -> Towers:
        """Return ``tower_paths`` after a check that the model has them.

        Raises:
            ModelError: the model lacks one of the modules.
        """
        names = {name for name, _ in model.named_modules()}
        for tower, paths in self.tower_paths.items():
            for path in paths:
                if path not in names:
                    raise ModelError(
                        f"{type(model).__name__} has no module {path!r}, the {tower} tower of {self.model_type}."
                        f"{did_you_mean(path, names)} Install a release of transformers that has it."
                    )
        return self.tower_paths

    def skeleton(self, name_or_path: str, *, revision: str | None = None) -> PreTrainedModel:
        """Return the model of a config on the meta device, with names and shapes but without weights."""
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
            return self.auto_class.from_config(config, trust_remote_code=False)

    def _unquantized(self, name_or_path: str, revision: str | None) -> list[str]:
        """Return the full paths of the modules that stay in 16 or 32 bit: all except the language tower.

        Raises:
            ModelError: the base has no language tower.
        """
        towers = self.towers(self.skeleton(name_or_path, revision=revision))
        if "language" not in towers:
            raise ModelError(
                f"{name_or_path}: only a language tower can be quantized, but this base only has {', '.join(towers)}. "
                "Set quantization to null."
            )
        return [path for tower, paths in towers.items() if tower != "language" for path in paths] + ["lm_head"]


def embedded_path(name_or_path: str) -> str:
    """Return the folder of an embedded base, and any other name unchanged."""
    target = EMBEDDED_BASES.get(name_or_path)
    return str(import_string(target)()) if target else name_or_path


def family_of(name_or_path: str, *, revision: str | None = None) -> ModelFamily:
    """Return the family of a model by its config's ``model_type``.

    Raises:
        ModelError: the model does not exist, or has no family.
    """
    try:
        # A plug-in registers its classes with transformers when it is imported.
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
        f"{name_or_path}: model_type must be a vision-language model of transformers, got {config.model_type}. "
        f"Supported by name: {', '.join(names('families'))}; and any other class of AutoModelForImageTextToText whose "
        "towers can be found."
    )

"""vLLM's LoRA resolver over the registry: from a reference with a digest to a folder."""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from finetune.adapters.reference import AdapterRef
from finetune.core.outside_text import safe_line
from finetune.errors import AdapterReferenceError, FinetuneError
from finetune.export.vllm_rules import VERSION
from finetune.vllm_plugin.name import NAME

if TYPE_CHECKING:
    from finetune.vllm_plugin.served import ServedAdapters

_log = logging.getLogger(f"vllm.{__name__}")


class RegistryResolver(LoRAResolver):
    """The LoRA resolver that finds adapters of a registry for vLLM, which never resolves a name twice.

    Attributes:
        location: the location of the registry.
        served: the adapters; None, so that no adapter is found, until the endpoint plugin has identified the base.
    """

    def __init__(self, location: str):
        self.location = location
        self.served: ServedAdapters | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return vLLM's request to load a reference with a digest; None for other names, which vLLM answers with 404.

        Args:
            base_model_name: vLLM's name of the base, which the endpoint identified at the start.
            lora_name: the ``model`` of a request.
        """
        try:
            ref = AdapterRef.parse(lora_name)
        except AdapterReferenceError:
            return None
        if self.served is None:
            _log.warning("%s is not served: VLLM_PLUGINS must name %s, and does not", ref, NAME)
            return None
        if ref.digest is None:
            _log.warning(
                "%s is not served: vLLM would not notice when the alias moves. Send JSON, or a digest",
                ref,
            )
            return None
        try:
            folder = await asyncio.to_thread(self.served.folder, str(ref))
        except FinetuneError as error:
            _log.warning("%s is not served: %s", ref, safe_line(str(error)))
            return None
        return LoRARequest(lora_name=str(ref), lora_int_id=1, lora_path=str(folder))  # vLLM sets the number itself


def register_resolver(location: str) -> None:
    """Register the resolver, unless this process has it already."""
    if NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    if (found := version("vllm").partition("+")[0]) != VERSION:
        _log.warning("%s was tested with vLLM %s, got %s: test it before you rely on it", NAME, VERSION, found)
    LoRAResolverRegistry.register_resolver(NAME, RegistryResolver(location))

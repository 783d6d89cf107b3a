"""The part of the plugin in vLLM's API server: the middleware, and the identity of the base."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.renderers.chat_utils import load_chat_template

from finetune.errors import LaunchError, brief
from finetune.registry import AdapterRegistry
from finetune.vllm_plugin.base import identify_served
from finetune.vllm_plugin.middleware import PinnedModels
from finetune.vllm_plugin.name import NAME
from finetune.vllm_plugin.resolver import RegistryResolver
from finetune.vllm_plugin.served import ServedAdapters

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI

_log = logging.getLogger(f"vllm.{__name__}")


class RegistryEndpoint:
    """vLLM's ``EndpointPlugin`` (vllm/plugins/endpoint_plugins/interface.py)."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the middleware before the routes; vLLM adds its own later, such as authentication, around it."""
        if (resolver := _resolver()) is not None:
            app.add_middleware(PinnedModels, served=lambda: resolver.served)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Identify the base, and open the registry.

        Raises:
            LaunchError: the settings of vLLM do not allow adapters of a registry; vLLM ends.
            FinetuneError: the base cannot be identified, or the registry cannot be opened.
        """
        if (resolver := _resolver()) is None:
            return
        require_settings(engine_client.vllm_config)
        config, template = engine_client.model_config, load_chat_template(args.chat_template)

        def start() -> ServedAdapters:
            base = identify_served(
                config.model,
                revision=config.revision,
                chat_template=template,
                max_lora_rank=engine_client.vllm_config.lora_config.max_lora_rank,
            )
            registry = AdapterRegistry(resolver.location)
            num_keys = len(registry.guard.policy.keys)  # an invalid policy must end the start
            _log.info(
                "%s: adapters of %s, with a policy of %d keys",
                NAME,
                resolver.location,
                num_keys,
            )
            _log.info("%s: the identity of the base is %s", NAME, base.identity.digest[:16])
            return ServedAdapters(registry, base)

        resolver.served = await asyncio.to_thread(start)


def require_settings(config: Any) -> None:
    """Check that the settings of vLLM allow adapters of a registry, and do not change their answers.

    Args:
        config: vLLM's whole config.

    Raises:
        LaunchError: a setting does not fit; the message names it.
    """
    if config.lora_config is None:
        raise LaunchError(
            f"{NAME} needs LoRA, and vLLM runs without it. Start vLLM with --enable-lora, or unset FINETUNE_REGISTRY."
        )
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise LaunchError(
            f"{NAME} needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and it is not set. Set it: otherwise vLLM asks no "
            "resolver. The plugin closes the routes that the setting opens."
        )
    if envs.VLLM_SKIP_MODEL_NAME_VALIDATION:
        raise LaunchError(
            f"{NAME} does not allow VLLM_SKIP_MODEL_NAME_VALIDATION, and it is set. Unset it: otherwise the plain base "
            "answers instead of every adapter."
        )
    model = config.model_config
    images = model.multimodal_config
    for flag, value in (
        ("--tokenizer", model.tokenizer != model.model and model.tokenizer),
        ("--hf-overrides", model.hf_overrides),
        ("--mm-processor-kwargs", images is not None and images.mm_processor_kwargs),
    ):
        if value:
            raise LaunchError(
                f"{NAME} serves the base with its own files, got {flag} {brief(value)}. Remove the option: adapters "
                "were trained without it."
            )


def _resolver() -> RegistryResolver | None:
    """Return the plugin's resolver; None if FINETUNE_REGISTRY is not set, which ``register`` has logged."""
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        return None
    resolver = LoRAResolverRegistry.get_resolver(NAME)
    assert isinstance(resolver, RegistryResolver)
    return resolver

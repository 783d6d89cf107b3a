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
        """Put the middleware before the routes; vLLM's own, authentication among them, then go around it."""
        if (resolver := _resolver()) is not None:
            app.add_middleware(PinnedModels, served=lambda: resolver.served)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Identify the base, which is hashed where it was not before, and open the registry.

        Raises:
            LaunchError: vLLM was started in a way in which adapters of a registry cannot be served; it ends then.
            FinetuneError: the base cannot be identified, or the registry not be opened.
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
            num_keys = len(registry.guard.policy.keys)  # a policy that cannot be used ends the start, here
            _log.info("%s: adapters of %s, whose policy has %d keys", NAME, resolver.location, num_keys)
            _log.info("%s: on the base %s", NAME, base.identity.digest[:16])
            return ServedAdapters(registry, base)

        resolver.served = await asyncio.to_thread(start)


def require_settings(config: Any) -> None:
    """Raise LaunchError where vLLM's settings do not allow adapters of a registry, or would change their answers.

    Args:
        config: vLLM's whole config.
    """
    if config.lora_config is None:
        raise LaunchError(f"{NAME} serves LoRA adapters: start vLLM with --enable-lora, or unset FINETUNE_REGISTRY.")
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise LaunchError(
            f"{NAME}: vLLM asks no resolver unless VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. Set it; the routes that it "
            "opens are closed by this plugin."
        )
    if envs.VLLM_SKIP_MODEL_NAME_VALIDATION:
        raise LaunchError(
            f"{NAME}: with VLLM_SKIP_MODEL_NAME_VALIDATION the plain base answers in the place of every adapter. Unset "
            "it."
        )
    model = config.model_config
    images = model.multimodal_config
    for flag, said in (
        ("--tokenizer", model.tokenizer != model.model and model.tokenizer),
        ("--hf-overrides", model.hf_overrides),
        ("--mm-processor-kwargs", images is not None and images.mm_processor_kwargs),
    ):
        if said:
            raise LaunchError(
                f"{NAME}: adapters were trained on their base as its files are; {flag} says {brief(said)}. Leave it "
                "out."
            )


def _resolver() -> RegistryResolver | None:
    """Return the plugin's resolver; None where FINETUNE_REGISTRY was not set, which ``register`` has logged."""
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        return None
    resolver = LoRAResolverRegistry.get_resolver(NAME)
    assert isinstance(resolver, RegistryResolver)
    return resolver

"""A plugin of vLLM: a request with ``"model": "medical/brain-mri@prod"`` is answered by an adapter of the registry.

Two entry points named ``finetune_registry``, which run in vLLM's environment:

- ``vllm.general_plugins``: ``register`` gives vLLM a LoRA resolver. vLLM never resolves a name twice, so the resolver
  accepts names with a digest only.
- ``vllm.endpoint_plugins``: ``endpoint.RegistryEndpoint`` puts a middleware before vLLM's routes, inside its
  authentication. The middleware replaces the reference in a request by one with its present digest, and closes the
  routes by which a client could load any folder. At start, the endpoint identifies the base, which every adapter must
  match.

vLLM loads the second only if ``VLLM_PLUGINS`` names it, and without it the resolver refuses. Nothing here imports
PEFT, transformers or datasets.
"""

import logging
import os

from finetune.vllm_plugin.name import NAME

_log = logging.getLogger(f"vllm.{__name__}")  # vLLM configures loggers below its own name


def register() -> None:
    """Register the resolver if ``FINETUNE_REGISTRY`` names a registry; vLLM calls this in each of its processes."""
    location = os.environ.get("FINETUNE_REGISTRY")
    if not location:
        _log.info("%s: FINETUNE_REGISTRY is not set, so vLLM loads no adapters from a registry", NAME)
        return
    from finetune.vllm_plugin.resolver import register_resolver

    register_resolver(location)

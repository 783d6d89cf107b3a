"""A plugin of vLLM: ``"model": "medical/brain-mri@prod"`` in a request, answered by an adapter of the registry.

Two entry points named ``finetune_registry``, which run in vLLM's environment:

- ``vllm.general_plugins``: ``register`` gives vLLM a LoRA resolver. vLLM never resolves a name twice, so the resolver
  knows names with a digest only.
- ``vllm.endpoint_plugins``: ``endpoint.RegistryEndpoint`` puts a middleware before vLLM's routes, inside its
  authentication. The middleware replaces the reference in a request by the one with the digest that it stands for now,
  and closes the routes by which anyone could load any folder. At start, the endpoint identifies the base, to which
  every adapter must belong.

vLLM loads the second only where ``VLLM_PLUGINS`` names it, and without it the resolver refuses. Nothing here loads
PEFT, transformers or datasets.
"""

import logging
import os

from finetune.vllm_plugin.name import NAME

_log = logging.getLogger(f"vllm.{__name__}")  # vLLM configures its own loggers, and those below them


def register() -> None:
    """Register the resolver, where ``FINETUNE_REGISTRY`` names a registry; vLLM calls it in each of its processes."""
    location = os.environ.get("FINETUNE_REGISTRY")
    if not location:
        _log.info("%s: FINETUNE_REGISTRY is not set, so no adapter comes from a registry", NAME)
        return
    from finetune.vllm_plugin.resolver import register_resolver

    register_resolver(location)

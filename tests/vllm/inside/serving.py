"""Run by vLLM's Python: the plugin in vLLM's own API server, whose engine is replaced by its loader of adapters.

The app, its routes, authentication, resolver table, ``OpenAIServingModels`` and the check of a request's model are
vLLM's, and adapters are loaded by its LoRA manager; only the answer, which needs a GPU, is made up: it says which
adapter vLLM would have used. Reads ``{"base", "registry", "steps": [...]}`` and prints what each step gave.
"""

import asyncio
import json
import sys

from loading import config_of, worker_of
from starlette.testclient import TestClient
from vllm.entrypoints.common.cli_args import make_arg_parser
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.plugins import load_general_plugins
from vllm.plugins.endpoint_plugins.interface import init_endpoint_plugins_state
from vllm.utils.argparse_utils import FlexibleArgumentParser

from finetune.registry import AdapterRegistry
from finetune.vllm_plugin.served import ServedAdapters


class Engine:
    """What ``OpenAIServingModels`` asks of an engine."""

    renderer = input_processor = None

    def __init__(self, config, worker):
        self.vllm_config, self.model_config, self.worker = config, config.model_config, worker

    async def add_lora(self, request):
        """As a worker does, with the errors that it has."""
        return self.worker.add_adapter(request)


class Answers(BaseServing):
    """In the place of the chat: vLLM's own check of the model, and its choice of an adapter."""

    async def create_chat_completion(self, request, raw_request):
        """Return an answer without choices, by the name of what would have answered."""
        if (error := await self._check_model(request)) is not None:
            return error
        chosen = self._maybe_get_adapters(request)
        usage = UsageInfo(prompt_tokens=chosen.lora_int_id if chosen else 0)
        return ChatCompletionResponse(model=self.models.model_name(chosen), choices=[], usage=usage)


async def start(app, engine, args):
    """As vLLM's init_app_state, without what renders prompts."""
    app.state.openai_serving_models = OpenAIServingModels(engine, [BaseModelPath("served/base", args.model)])
    app.state.openai_serving_chat = Answers(app.state.openai_serving_models, engine.model_config)
    app.state.enable_server_load_tracking = False
    await init_endpoint_plugins_state(engine, app.state, args)


def step(client, registry, what):
    """Do one step, and return what came of it."""
    if "alias" in what:
        registry.alias(what["name"], what["alias"], what["version"])
        return {}
    headers = {"Authorization": "Bearer key"} if what.get("key", True) else {}
    answer = client.request(what.get("method", "POST"), what["path"], json=what.get("json"), headers=headers)
    return {"status": answer.status_code, "json": answer.json() if answer.content else None}


def main(given):
    """Start the server and take the steps."""
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", given["base"], "--enable-lora", "--api-key", "key"])
    load_general_plugins()
    ServedAdapters.__init__.__kwdefaults__["alias_seconds"] = 0.0  # each request asks anew
    found = {"resolvers": list(LoRAResolverRegistry.get_supported_resolvers())}
    config = config_of(given["base"], 16)
    app = build_app(args, ("generate",), config.model_config)
    try:
        asyncio.run(start(app, Engine(config, worker_of(config)), args))
    except Exception as error:
        return {**found, "start": f"{type(error).__name__}: {error}"}
    client, registry = TestClient(app, raise_server_exceptions=False), AdapterRegistry(given["registry"])
    return {**found, "start": "", "steps": [step(client, registry, what) for what in given["steps"]]}


if __name__ == "__main__":
    given, out = json.load(sys.stdin), sys.stdout
    sys.stdout = sys.stderr
    found = main(given)
    print(json.dumps(found), file=out)

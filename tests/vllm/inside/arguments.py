"""Run by vLLM's Python: prints vLLM's own numbers and names, which ours are held against."""

import inspect
import json
import re
from typing import get_args

import on_cpu  # noqa: F401
import vllm
from vllm import envs
from vllm.config.lora import MaxLoRARanks
from vllm.entrypoints.common.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.metrics import loggers

if __name__ == "__main__":
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = {
        "version": vllm.__version__,
        "max_lora_ranks": get_args(MaxLoRARanks),
        "arguments": sorted(flag for action in parser._actions for flag in action.option_strings),
        "environment": sorted(envs.environment_variables),
        "metrics": re.findall(r'name="(vllm:\w+)"', inspect.getsource(loggers)),
    }
    print(json.dumps(arguments))

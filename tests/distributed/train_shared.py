"""recipes/train.py with the base cut over the processes, on the CPU, where accelerate itself offers no FSDP."""

import sys
from types import SimpleNamespace

from finetune.recipe import load_recipe
from finetune.runs import train as runs
from finetune.training.fsdp2 import SplitBase


def shared(accelerator, recipe):
    """What ``strategy_of`` returns for recipes/accelerate/fsdp2.yaml."""
    accelerator.state.fsdp_plugin = SimpleNamespace(reshard_after_forward=True)
    return SplitBase(accelerator)


if __name__ == "__main__":
    runs.strategy_of = shared
    runs.train(load_recipe(sys.argv[1], sys.argv[2:]))

"""Run by vLLM's Python: builds vLLM's own models of tiny bases on the CPU and has its LoRA manager load adapters.

Reads JSON from stdin: a list of ``{"family", "base", "max_lora_rank", "adapters": {label: folder}}``. Prints, as its
last line, ``{family: {"start": error, "class": name, "adapters": {label: {"refused": error} or {"updates": {module:
norm of B A}}}}}``, in which packed modules are taken apart.
"""

import json
import sys
import tempfile

import on_cpu  # noqa: F401
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.model_loader.utils import initialize_model


def config_of(base, max_lora_rank):
    """Return vLLM's config, as ``vllm serve BASE --enable-lora --max-lora-rank R`` makes it."""
    return EngineArgs(
        model=base,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=64,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=max_lora_rank,
    ).create_engine_config()


def worker_of(config):
    """Return what loads adapters in a worker, around vLLM's own model of the base with random weights."""
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/rendezvous", 0, "gloo")
            initialize_model_parallel(1, 1)
        model = initialize_model(vllm_config=config)
        worker = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), getattr(model, "embedding_modules", {}))
        worker.create_lora_manager(model, config)
    return worker


def load(job):
    """Return what vLLM makes of the adapters of one base."""
    try:
        config = config_of(job["base"], job["max_lora_rank"])
    except ValueError as error:
        return {"start": _reason(error), "adapters": {}}
    worker = worker_of(config)
    with set_current_vllm_config(config):
        found = {label: _add(worker, number, path) for number, (label, path) in enumerate(job["adapters"].items(), 1)}
    return {"start": "", "class": type(worker._adapter_manager.model).__name__, "adapters": found}


def _reason(error):
    return f"{type(error).__name__}: {error}"


def _add(worker, number, path):
    try:
        worker.add_adapter(LoRARequest(lora_name=path, lora_int_id=number, lora_path=path))
    except Exception as error:
        return {"refused": _reason(error)}
    manager = worker._adapter_manager
    slot, updates = manager.lora_index_to_id.index(number), {}
    for name, module in manager.modules.items():
        parts = manager.packed_modules_mapping.get(name.rpartition(".")[2]) or [name.rpartition(".")[2]]
        if not isinstance(module.lora_a_stacked, tuple):
            continue  # an embedding
        for part, down, up in zip(parts, module.lora_a_stacked, module.lora_b_stacked, strict=True):
            if norm := (up[slot, 0].double() @ down[slot, 0].double()).norm().item():
                updates[f"{name.rpartition('.')[0]}.{part}"] = norm
    worker.remove_adapter(number)
    return {"updates": updates}


if __name__ == "__main__":
    jobs, out = json.load(sys.stdin), sys.stdout
    sys.stdout = sys.stderr
    found = {job["family"]: load(job) for job in jobs}
    print(json.dumps(found), file=out)

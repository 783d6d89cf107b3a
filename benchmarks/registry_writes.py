"""The cost of writing to a registry in a folder, and of listing a large one.

python -m benchmarks.registry_writes --json FILE      takes about a minute on two idle CPU cores

Everything is written durably (fsync), into a temporary folder below ``--folder``; the benchmark measures that disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from finetune.adapters.manifest import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, AdapterManifest, sha256_hex
from finetune.registry import AdapterRegistry, Commit
from finetune.registry.log.commits import log_key
from finetune.registry.storage.local import LocalStore
from finetune.registry.storage.location import is_registry

WANTED = {"publish_10000_vs_1": 1.5, "alias_10000_vs_1": 1.5, "list_10000_seconds": 1.0}  # at most


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the figures and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registry_writes", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    parser.add_argument("--folder", type=Path, default=None, help="folder to write in (the system's temporary folder)")
    parser.add_argument("--history", type=int, default=10_000, help="commits of the long log (10000)")
    parser.add_argument("--names", type=int, default=10_000, help="adapters to list (10000)")
    parser.add_argument("--rounds", type=int, default=200, help="publishes timed on each log (200)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="registry-", dir=options.folder) as name:
        folder = Path(name)
        os.environ["FINETUNE_CACHE"] = str(folder / "cache")
        figures = commits(folder, options.history, options.rounds)
        figures |= publishes(folder, processes=1, rounds=options.rounds)
        figures |= publishes(folder, processes=8, rounds=options.rounds)
        figures |= listing(folder, options.names)
    for key, value in figures.items():
        verdict = f"  <= {WANTED[key]:g}: {'yes' if value <= WANTED[key] else 'no'}" if key in WANTED else ""
        print(f"{key:32}{value:12.4g}{verdict}")
    if options.json:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
        text = json.dumps(figures | {"details": vars(options) | {"json": None, "folder": None} | machine}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def write_adapter(folder: Path, full_name: str, seed: int = 0) -> Path:
    """Write a small valid adapter folder, of 3 files and its manifest, and return it."""
    namespace, name = full_name.split("/")
    zero = "0" * 64
    files = {WEIGHTS_NAME: f"weights {seed}".encode() * 500, CONFIG_NAME: b"{}", "README.md": f"# {name}\n".encode()}
    manifest = {
        "namespace": namespace,
        "name": name,
        "created": "2031-01-01T00:00:00Z",
        "synthetic": True,
        "base": {"model_type": "toy", "files": {"model.safetensors": zero}, "config": zero, "hub_id": "toy/base"},
        "processor": dict.fromkeys(("tokenizer", "processor_config", "chat_template", "generation_config"), zero),
        "adapter": {
            "peft_type": "LORA",
            "parts": [{"method": "lora", "options": {"r": 2}, "modules": {"language": ["model.layer"]}}],
            "tensors": {"model.layer.lora_A": {"shape": [2, 4], "dtype": "F32"}},
        },
        "task": {
            "name": "vqa",
            "question_template": "{question}",
            "max_new_tokens": 16,
            "answer_normalization": "vqa",
        },
        "toolchain": {"torch": "2"},
        "training": {
            "recipe_digest": zero,
            "data": {"train": zero},
            "rows": {"train": 8},
            "seed": seed,
            "steps": 3,
            "task": "vqa",
            "domain": namespace,
        },
        "metrics": {"base": {"n": 40}, "test": {"n": 40}},
        "probe": {"version": 1, "seed": 0, "dtype": "float32", "base": [[0.0]] * 4, "adapter": [[1.0]] * 4},
        "files": {name: {"sha256": sha256_hex(data), "size": len(data)} for name, data in files.items()},
    }
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST_NAME).write_bytes(AdapterManifest.model_validate(manifest).to_bytes())
    return folder


def write_history(store: LocalStore, full_name: str, length: int) -> None:
    """Write a log of publishes without syncing; its manifests are missing, as no commit reads them."""
    namespace, name = full_name.split("/")
    is_registry(store, create=True)
    fields = {"manifest": "1" * 64, "aliases": {}, "summary": {"task": "vqa", "base": "2" * 64}}
    commit = Commit.after(None, op="publish", txn=uuid.uuid4().hex, version=1, **fields)
    (store.root / log_key(namespace, name, 1)).parent.mkdir(parents=True)
    for seq in range(1, length + 1):
        raw = commit.to_bytes()
        (store.root / log_key(namespace, name, seq)).write_bytes(raw)
        latest = {"seq": seq + 1, "version": seq + 1, "aliases": {"latest": seq + 1}}
        commit = commit.model_copy(update=latest | {"prev": sha256_hex(raw), "txn": uuid.uuid4().hex})


def commits(folder: Path, length: int, rounds: int) -> dict[str, float]:
    """Measure a publish, and a move of an alias to the newest version, with a log of one entry and a long log."""
    registry = AdapterRegistry(folder / "commits")
    logs = {"team/short": 1, "team/long": length}
    adapters = {name: write_adapter(folder / "adapters" / name, name) for name in logs}
    times: dict[str, list[float]] = {f"{verb} {name}": [] for verb in ("publish", "alias") for name in logs}
    for name, number in logs.items():
        write_history(LocalStore(registry.location), name, number)
        registry.publish(adapters[name])  # a first write searches for the newest entry
    for _ in range(rounds):
        for name in logs:  # in turn, so that both have the same disk
            begun = time.perf_counter()
            version = registry.publish(adapters[name]).version
            published = time.perf_counter()
            registry.alias(name, "prod", version)
            times[f"publish {name}"].append(published - begun)
            times[f"alias {name}"].append(time.perf_counter() - published)
    took = {what: statistics.median(seconds) for what, seconds in times.items()}
    return {
        "publish_ms": 1e3 * took["publish team/short"],
        "alias_ms": 1e3 * took["alias team/short"],
        f"publish_{length}_vs_1": took["publish team/long"] / took["publish team/short"],
        f"alias_{length}_vs_1": took["alias team/long"] / took["alias team/short"],
    }


def _publish(location: str, folder: str, rounds: int) -> None:
    registry = AdapterRegistry(location)
    for _ in range(rounds):
        registry.publish(folder)


def publishes(folder: Path, *, processes: int, rounds: int) -> dict[str, float]:
    """Measure the times of publishes of one name by several processes, of files that all exist already."""
    location = str(folder / f"by-{processes}")
    adapter = str(write_adapter(folder / f"adapter-{processes}", "team/adapter"))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_publish, [location] * processes, [adapter] * processes, [1] * processes))  # starts them
        begun = time.perf_counter()
        list(pool.map(_publish, [location] * processes, [adapter] * processes, [rounds // processes] * processes))
        seconds = time.perf_counter() - begun
    return {f"publishes_per_second_by_{processes}": rounds // processes * processes / seconds}


def listing(folder: Path, number: int) -> dict[str, float]:
    """Measure the times of ``list``: the first call, the second, and the command in a process of its own."""
    registry = AdapterRegistry(folder / "many")
    for n in range(number):
        write_history(LocalStore(registry.location), f"team-{n % 20}/adapter-{n}", 1)
    figures = {}
    for when in ("cold", "warm"):
        begun = time.perf_counter()
        assert len(AdapterRegistry(registry.location).list()) == number
        figures[f"list_{number}_{when}_in_process"] = time.perf_counter() - begun
    command = [sys.executable, "-m", "finetune.cli", "registry", "list", "--registry", registry.location]
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begun)
        assert done.stdout.count("\n") == number + 1
    return figures | {f"list_{number}_seconds": statistics.median(seconds)}


if __name__ == "__main__":
    sys.exit(main())

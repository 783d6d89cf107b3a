"""One part of benchmarks/gpu.sh, in a process of its own: what a GPU does with this package, as JSON.

python -m benchmarks.gpu PART --device cuda --json FILE
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finetune.pocket.world import draw_scene

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).parents[1]
PHANTOMS = ROOT / "recipes" / "configs" / "medical" / "phantoms.yaml"


class Part:
    """The device and the folder of a part.

    Args:
        device: ``cuda``, or ``cpu`` to try the part with models of a few layers.
        folder: a folder that is deleted afterwards.
    """

    def __init__(self, device: str, folder: Path):
        self.device, self.folder = device, folder
        self.tries = device == "cpu"
        self.dtype = "float32" if self.tries else "bfloat16"
        self.steps = 3 if self.tries else 20

    def size(self, real: str, tiny: str = "tiny") -> str:
        """Return the model's name, or that of the one to try with."""
        return tiny if self.tries else real


def compare(part: Part, model: str, only: Sequence[str], *, steps: int) -> dict[str, Any]:
    """Measure contestants side by side in two rounds after the warm-up; without trl, the others."""
    from benchmarks.training import main

    file = part.folder / "training.json"
    only = [name for name in only if name != "trl" or importlib.util.find_spec("trl")]
    words = ["--models", model, "--only", ",".join(only), "--rounds", "2", "--steps", str(steps)]
    main([*words, "--device", part.device, "--dtype", part.dtype, "--json", str(file)])
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    peak = found["details"]["peak_tflops"] * 1e12
    for one in found["details"]["models"][model]["contestants"].values():
        one["gib"] = one["cuda_bytes"] / 2**30
        one["mfu"] = None if part.tries else one["step_flops"] / one["step_seconds"] / peak
    return found


def qwen(part: Part) -> dict[str, Any]:
    """Compare a LoRA step of Qwen2.5-VL-3B geometry with trl's and that of a bare loop."""
    model, steps = part.size("qwen", "tiny-qwen"), 1 if part.tries else 8
    return compare(part, model, ("ours", "trl", "bare"), steps=steps)


def smolvlm(part: Part) -> dict[str, Any]:
    """Compare a LoRA step of SmolVLM-256M geometry, also from stored features."""
    model, steps = part.size("b"), 1 if part.tries else 10
    return compare(part, model, ("ours", "stored", "trl", "bare"), steps=steps)


def use(part: Part) -> dict[str, Any]:
    """Run ``finetune train``, ``ask`` and ``serve`` once each."""
    base = ("--device", part.device, "--dtype", part.dtype)
    rows = 16 if part.tries else 320
    words = [f"train.output_dir={part.folder / 'runs'}", "train.epochs=1", "train.batch_size=8"]
    words += [f"data.rows={{train: {rows}, val: 8, test: 8}}"]
    words += [f"model.device={part.device}", f"model.dtype={part.dtype}"]
    trained = _finetune("train", PHANTOMS, *words)
    adapter, image = "medical/phantoms", part.folder / "image.png"  # as published in the registry of this part
    _write_image(image)
    answer = _finetune("ask", adapter, image, "Which organ is it?", *base)
    served, seconds = _served(adapter, image, base)
    return {
        "train_seconds": trained[1],
        "lines": _log(part.folder / "runs" / "phantoms"),
        "ask": {"answer": answer[0].strip(), "seconds": answer[1]},
        "serve": {"answer": served, "seconds": seconds},
    }


def quantized(part: Part) -> dict[str, Any]:
    """Train on a base in 4 bit, and on the same base in bfloat16."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"left_out": "bitsandbytes is not installed"}
    return _variants(part, {"16bit": {}, "4bit": {"model": {"quantization": "4bit"}}})


def compiled(part: Part) -> dict[str, Any]:
    """Train with torch.compile, and without."""
    found = {"plain": {}, "compiled": {"train": {"torch_compile": True}}}
    return _variants(part, found)


def attention(part: Part) -> dict[str, Any]:
    """Train with each implementation of attention that is here."""
    names = ["eager", "sdpa"]
    if importlib.util.find_spec("flash_attn") and not part.tries:
        names.append("flash_attention_2")
    found = _variants(part, {name: {"model": {"attn_implementation": name}} for name in names})
    return found if "flash_attention_2" in names else found | {"left_out": "flash_attention_2: flash-attn is not here"}


def fsdp2(part: Part) -> dict[str, Any]:
    """Train with the base sharded over one device; on a CPU, through the same launcher without sharding."""
    recipe = part.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(part, "fsdp2", {})), encoding="utf-8")
    config = ROOT / "recipes" / "accelerate" / ("cpu.yaml" if part.tries else "fsdp2.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    seconds = _run([*launcher, "--num_processes", "1", str(ROOT / "recipes" / "train.py"), str(recipe)])[1]
    return {"seconds": seconds, "lines": _log(part.folder / "runs" / "fsdp2")}


def marked(part: Part) -> dict[str, Any]:
    """Run the tests that need a GPU; on a CPU they are only collected."""
    files = ["tests/training/test_rows.py", "tests/distributed/test_whole_run.py"]
    words = [*files, "-m", "gpu", "-q", "-p", "no:cacheprovider", *(["--collect-only"] if part.tries else [])]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} of pytest\n{done.stdout[-3000:]}")
    return {"tests": done.stdout.strip().splitlines()[-30:]}


# The most telling first; gpu.sh gives each its seconds.
PARTS: dict[str, Callable[[Part], dict[str, Any]]] = {
    "qwen": qwen,
    "smolvlm": smolvlm,
    "use": use,
    "quantized": quantized,
    "attention": attention,
    "compiled": compiled,
    "fsdp2": fsdp2,
    "marked": marked,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one part and write what it found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS, help="part to run")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries it with tiny models (cuda)"
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="file to write the result to")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-part-") as folder:
        os.environ["FINETUNE_CACHE"] = str(Path(folder) / "cache")
        os.environ["FINETUNE_REGISTRY"] = str(Path(folder) / "registry")
        found = PARTS[options.part](Part(options.device, Path(folder)))
    found = {"seconds_in_all": round(time.monotonic() - began, 1), **found}
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _variants(part: Part, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Train the same rows in each way; a way that fails says so, and the next one runs."""
    import torch

    from finetune.recipe import parse_recipe
    from finetune.runs.train import train

    found: dict[str, Any] = {}
    for name, changes in variants.items():
        if not part.tries:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            train(parse_recipe(_recipe(part, name, changes), source=name))
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
            continue
        gib = None if part.tries else torch.cuda.max_memory_allocated() / 2**30
        found[name] = {"gib": gib, "lines": _log(part.folder / "runs" / name)}
    if all("failed" in one for one in found.values()):
        raise RuntimeError(f"every variant failed: {found}")
    return found


def _recipe(part: Part, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe on rows and a base that are written once."""
    base, rows = _base_and_rows(part)
    train = {"max_steps": part.steps, "batch_size": 4, "logging_steps": max(1, part.steps // 2)}
    train |= {"output_dir": str(part.folder / "runs"), "feature_store": "off"}
    return {
        "name": name,
        "domain": "benchmark",
        "model": {"name_or_path": str(base), "device": part.device, "dtype": part.dtype, **changes.get("model", {})},
        "method": {"name": "lora", "r": 8},
        "data": {"source": "jsonl", "root": str(rows), "val": None, "test": None},
        "train": train | changes.get("train", {}),
    }


def _base_and_rows(part: Part) -> tuple[Path, Path]:
    import torch
    from transformers import AutoProcessor

    from benchmarks.models import SETUPS
    from benchmarks.rows import write_rows

    setup, base, rows = SETUPS[part.size("b")], part.folder / "base", part.folder / "rows"
    if not rows.exists():
        setup.save(base, getattr(torch, part.dtype))
        write_rows(rows, setup, AutoProcessor.from_pretrained(base).tokenizer, num_rows=16)
    return base, rows


def _log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _write_image(file: Path) -> None:
    from PIL import Image

    Image.fromarray(draw_scene(0, "benchmark", 0).image).save(file)


def _finetune(*words: object) -> tuple[str, float]:
    return _run([sys.executable, "-m", "finetune.cli", *map(str, words)])


def _run(command: Sequence[str]) -> tuple[str, float]:
    """Return the output of a command and its seconds; its errors end the part."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"exit code {done.returncode}: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout, round(time.monotonic() - began, 2)


def _served(adapter: str, image: Path, options: Sequence[str]) -> tuple[str, float]:
    """Start the server, ask it once, and return the answer and the seconds until it came."""
    import base64

    command = [sys.executable, "-m", "finetune.cli", "serve", adapter, "--port", "0", *options]
    began = time.monotonic()
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        if not line.startswith("serving on "):
            raise RuntimeError(f"the server must print its address when it starts, got {line!r}")
        address = line.removeprefix("serving on ").strip()
        data = base64.b64encode(image.read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            {"type": "text", "text": "Which organ is it?"},
        ]
        asked = {"model": adapter, "messages": [{"role": "user", "content": content}]}
        request = urllib.request.Request(
            f"{address}/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"]
        return answer, round(time.monotonic() - began, 2)
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    sys.exit(main())

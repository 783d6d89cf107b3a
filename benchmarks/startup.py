"""The start of commands beside scripts of torch and transformers alone, which do the same and nothing more.

python -m benchmarks.startup --json startup.json      takes about 5 minutes on an idle CPU core
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.request import ProxyHandler, Request, build_opener

import torch
import yaml

from benchmarks.adapters import make_adapter
from benchmarks.measure import BenchmarkError
from benchmarks.models import SETUPS
from benchmarks.results import machine
from benchmarks.rows import QUESTION, write_rows
from finetune.assemble.loading import load_base
from finetune.registry import AdapterRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WANTED = {"ask_vs_floor": 1.15, "train_vs_floor": 1.3, "serve_vs_floor": 1.2}  # at most, of CPU seconds
NUM_TOKENS = 4  # of an answer: its time is not what is measured
_NUM_ROWS = 64
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Spent:
    """The seconds from the start of a process to its first result.

    Attributes:
        cpu: the CPU seconds of the process and its ended children.
        wall: the wall time.
    """

    cpu: float
    wall: float


@dataclass(frozen=True)
class Pair:
    """A command of this project and its floor, and the function that waits for the first result of either.

    Attributes:
        ours: the arguments of ``python -m``.
        floor: the arguments of ``python -m``.
        wait: the function that returns when the process has given its first result, given its output.
    """

    ours: Sequence[str]
    floor: Sequence[str]
    wait: Callable[[Any], None]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table and write the figures."""
    options = _parse(arguments)
    # One thread, whose CPU seconds repeat; nothing is left, and nothing found, outside of the folder.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        os.environ["FINETUNE_CACHE"], os.environ["FINETUNE_REGISTRY"] = str(folder / "cache"), str(folder / "registry")
        pairs = prepare(folder, options.model)
        times: dict[str, dict[str, list[Spent]]] = {case: {"ours": [], "floor": []} for case in options.cases}
        for number in range(-1, options.rounds):  # the first one warms up, and leaves the receipt of the probe
            for case, found in times.items():
                pair = pairs[case]
                for who, command in (("ours", pair.ours), ("floor", pair.floor)):
                    spent = start(command, pair.wait, folder / f"{case}-{who}")
                    if number >= 0:
                        found[who].append(spent)
    reached = figures(times)
    print(table(reached, times))
    if options.json:
        details = {
            "machine": machine(torch.device("cpu")) | {"threads": 1},
            "model": SETUPS[options.model].title,
            "rounds": options.rounds,
            "seconds": {
                case: {who: [vars(one) for one in spent] for who, spent in found.items()}
                for case, found in times.items()
            },
        }
        options.json.write_text(json.dumps(reached | {"details": details}, indent=1) + "\n", encoding="utf-8")
    return 0


def prepare(folder: Path, model: str) -> dict[str, Pair]:
    """Write a base, an adapter, rows and a recipe; return each case -> its commands."""
    setup = SETUPS[model]
    path = str(setup.save(folder / "base", torch.float32))
    base = load_base(path, device="cpu")
    adapter = make_adapter(base, folder / "adapter", r=8, max_new_tokens=NUM_TOKENS)
    ref = AdapterRegistry().publish(adapter, aliases=["prod"]).full_name + "@prod"
    rows = write_rows(folder / "rows", setup, base.processor.tokenizer, num_rows=_NUM_ROWS)
    recipe = {
        "name": "startup",
        "domain": "bench",
        "model": {"name_or_path": path, "device": "cpu"},
        "method": {"name": "lora", "r": 8, "lora_alpha": 16},
        "data": {"source": "jsonl", "root": str(rows), "val": None, "test": None},
        "task": {"name": "vqa"},
        "train": {"max_steps": 100, "batch_size": setup.batch_size, "resume": "never", "output_dir": str(folder)},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    image, tokens = rows / "images" / "0.png", str(NUM_TOKENS)
    on_base = ("--base", path, "--device", "cpu")
    return {
        "ask": Pair(
            ("finetune.cli", "ask", ref, str(image), QUESTION, *on_base),
            ("benchmarks.floors.ask", path, str(image), QUESTION, tokens),
            _read_to_the_end,
        ),
        "train": Pair(
            ("finetune.cli", "train", str(folder / "recipe.yaml")),
            ("benchmarks.floors.train", path, str(rows / "train.jsonl"), str(setup.batch_size)),
            _read_plan,
        ),
        "serve": Pair(
            ("finetune.cli", "serve", ref, *on_base, "--port", "0"),
            ("benchmarks.floors.serve", path, tokens),
            lambda output: _ask_server(output, ref, image.read_bytes()),
        ),
    }


def start(command: Sequence[str], wait: Callable[[Any], None], log: Path) -> Spent:
    """Start a process, wait for its first result, and end it.

    Raises:
        BenchmarkError: the process fails before that.
    """
    begun = time.perf_counter()
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    try:
        wait(process.stdout)
        wall, cpu = time.perf_counter() - begun, _cpu_seconds(process.pid)
    except BenchmarkError as error:
        raise BenchmarkError(f"{' '.join(command[:2])}: {error}\n{log.read_text()[-2000:]}") from None
    finally:
        process.terminate()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()
    return Spent(cpu=cpu, wall=wall)


def figures(times: dict[str, dict[str, list[Spent]]]) -> dict[str, float]:
    """Return the ratios of medians, and ours in seconds."""
    out = {}
    for case, found in times.items():
        for what, end in (("cpu", ""), ("wall", "_wall")):
            ours, floor = (median(getattr(one, what) for one in found[who]) for who in ("ours", "floor"))
            out[f"{case}_vs_floor{end}"] = ours / floor
            out[f"{case}_{what}_seconds"] = ours
    return out


def table(reached: dict[str, float], times: dict[str, dict[str, list[Spent]]]) -> str:
    """Return all figures as text."""
    lines = [f"{'':8}{'ours CPU s':>12}{'floor CPU s':>13}{'ours wall s':>13}{'floor wall s':>14}"]
    for case, found in times.items():
        columns = [(who, what) for what in ("cpu", "wall") for who in ("ours", "floor")]
        values = (median(getattr(one, what) for one in found[who]) for who, what in columns)
        lines.append(f"{case:8}" + "".join(f"{value:>13.2f}" for value in values))
    for name, wanted in WANTED.items():
        if name in reached:
            verdict = "yes" if reached[name] <= wanted else "no"
            lines.append(f"{name:18}{reached[name]:>8.3f}  <= {wanted:g}: {verdict}")
    return "\n".join(lines)


def _cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process that has not been waited for, and of its children that have."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


def _read_to_the_end(output: Any) -> None:
    if not output.read():  # an answer may be empty, and a line even then
        raise BenchmarkError("it must print an answer, and printed nothing")


def _read_plan(output: Any) -> None:
    """Wait for ``finetune train`` to show the adapter, the last part of its plan, or for the floor to be ready."""
    for line in output:
        if line.startswith(("adapter", "ready")):
            return
    raise BenchmarkError("it must print its plan, and ended")


def _ask_server(output: Any, ref: str, image: bytes) -> None:
    line = output.readline()
    if not line.startswith("serving on "):
        raise BenchmarkError(f"it must print its address, got {line!r}")
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"model": ref, "messages": [{"role": "user", "content": content}]}
    request = Request(
        f"{line.removeprefix('serving on ').strip()}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with build_opener(ProxyHandler({})).open(request, timeout=60) as answer:
        found = json.load(answer)
    if "content" not in found["choices"][0]["message"]:
        raise BenchmarkError(f"it must answer, got {found}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    parser.add_argument("--model", choices=SETUPS, default="a", help="base (a, the pocket model)")
    parser.add_argument("--cases", default="ask,train,serve", help="what to start (ask,train,serve)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs that count; one more warms up (7)")
    options = parser.parse_args(arguments)
    options.cases = options.cases.split(",")
    if not set(options.cases) <= {"ask", "train", "serve"} or options.rounds < 1:
        parser.error("--cases must be of ask, train and serve, and --rounds at least 1")
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"error: {error}")

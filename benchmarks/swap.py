"""Swapping side by side with PEFT: switching between loaded adapters, loading one more, and mixing them in a batch.

python -m benchmarks.swap --json swap.json      takes about 15 minutes on two idle CPU cores
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from benchmarks.adapters import Adapters, make_adapter, make_adapters
from benchmarks.measure import BenchmarkError
from benchmarks.mixing import RANKS, measure_mixed
from benchmarks.models import SETUPS
from benchmarks.results import machine
from finetune.adapters.manifest import WEIGHTS_NAME
from finetune.assemble.loading import load_base
from finetune.registry import AdapterRegistry
from finetune.serving.receipts import keep_receipt
from finetune.serving.vision_language_model import VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from finetune.serving.loaded_adapter import LoadedAdapter

# Figure -> what it should reach; at most for those of _AT_MOST, at least for all others.
WANTED = {
    "switch_ms_1": 1.0,
    "switch_ms_64": 1.0,
    "switch_growth": 1.5,
    "switch_vs_peft": 20.0,
    "cold_vs_floor": 2.0,
    "cold_vs_peft": 8.0,
    "cold_with_probe_ms": 1500.0,
    "mixed_vs_separate": 2.5,
    "mixed_vs_peft": 1.5,
}
_AT_MOST = ("switch_ms_1", "switch_ms_64", "switch_growth", "cold_vs_floor", "cold_with_probe_ms")
Times = dict[str, list[float]]  # who -> seconds of each round


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table and write the figures."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        # Nothing is left, and nothing found, elsewhere.
        os.environ["FINETUNE_CACHE"], os.environ["FINETUNE_REGISTRY"] = str(folder / "cache"), str(folder / "registry")
        path = str(SETUPS[options.model].save(folder / "base", torch.float32))
        base = load_base(path, device="cpu")
        num_cold = (options.rounds + 1) * len(options.loaded) + options.probes
        adapters = make_adapters(base, folder, count=max(options.loaded), num_cold=num_cold, r=options.r)
        mixed = [
            make_adapter(base, folder / f"mixed-{i}", r=r, seed=i, max_new_tokens=options.new_tokens)
            for i, r in enumerate(RANKS)
        ]
        ours = VisionLanguageModel(load_base(path, device="cpu"), registry=AdapterRegistry())
        theirs = PeftModel.from_pretrained(load_base(path, device="cpu").model, adapters.folder, adapter_name="a0")
        check_equal(ours, theirs, adapters)
        switching, loading = {}, {}
        for count in options.loaded:
            make_loaded(ours, theirs, adapters, count)
            switching[count] = measure_switch(ours, theirs, adapters, count, rounds=options.rounds)
            loading[count] = measure_cold(ours, theirs, adapters, rounds=options.rounds)
            print(f"{count} loaded: switched {options.rounds} times, loaded {options.rounds} times", flush=True)
        probed = [measure_probe(ours, adapters.cold.pop()) for _ in range(options.probes)]
        mixing = {
            rows: measure_mixed(ours, theirs, mixed, side=side, rounds=options.mixed_rounds)
            for rows, side in (("questions", None), ("images", SETUPS[options.model].side))
        }
    reached = figures(switching, loading, probed, mixing)
    print(table(reached, switching, loading, mixing))
    if options.json:
        details = {
            "machine": machine(torch.device("cpu")),
            "model": SETUPS[options.model].title,
            "r": options.r,
            "rounds": options.rounds,
            "switching": {str(count): times for count, times in switching.items()},
            "loading": {str(count): times for count, times in loading.items()},
            "with_probe": probed,
            "new_tokens": options.new_tokens,
            "mixing": mixing,
        }
        options.json.write_text(json.dumps(reached | {"details": details}, indent=1) + "\n", encoding="utf-8")
    return 0


def check_equal(ours: VisionLanguageModel, theirs: PeftModel, adapters: Adapters) -> None:
    """Check that both compute the same, bit for bit, with the same adapter.

    Raises:
        BenchmarkError: the outputs differ, or the adapter changes nothing.
    """
    with ours.using(adapters.refs[0]):
        mine = _forward(ours.model)
    if not torch.equal(mine, _forward(theirs)) or torch.equal(mine, _forward(ours.model)):
        raise BenchmarkError(
            "the adapter must have an effect, and the same one as in PEFT: the outputs are unchanged or others"
        )


def make_loaded(ours: VisionLanguageModel, theirs: PeftModel, adapters: Adapters, count: int) -> None:
    """Have the first ``count`` adapters loaded in both; as all are the same, the first one is probed for all."""
    first = ours.add(adapters.refs[0])
    for number in range(count):
        ref = adapters.refs[number]
        _leave_receipt(ours, ref, first)
        ours.add(ref)
        if f"a{number}" not in theirs.peft_config:
            theirs.load_adapter(str(adapters.folder), adapter_name=f"a{number}")


def measure_switch(
    ours: VisionLanguageModel, theirs: PeftModel, adapters: Adapters, count: int, *, rounds: int
) -> Times:
    """Measure the times of switches to one loaded adapter of ``count`` after the other, in alternating rounds.

    Ours is a whole ``with using(ref)`` by name, from looking up the alias to leaving the block. ``ours_loaded`` is
    the same where the adapter is given and not looked up. Each has a forward of one token after it, timed apart, which
    would show what was put off until then, and ``base_forward`` is that of the plain base.
    """
    times: Times = {who: [] for who in ("ours", "peft", "ours_loaded", "ours_forward", "peft_forward", "base_forward")}
    loaded_adapters = [ours.add(ref) for ref in adapters.refs[:count]]
    for number in range(-1, rounds):  # the first one warms up
        which = number % count
        # Ours follows a forward of the plain base, however many adapters there are: PEFT's walk over all its modules
        # would leave the processor's caches to ours as no app does.
        found = {"base_forward": _timed(lambda: _forward(ours.model))}
        for who, target in (("ours_loaded", loaded_adapters[which]), ("ours", adapters.refs[which])):
            begun = time.perf_counter()
            with ours.using(target):
                entered = time.perf_counter()
                _forward(ours.model)
                done = time.perf_counter()
            found[who] = entered - begun + time.perf_counter() - done
            found["ours_forward"] = done - entered
        found["peft"] = _timed(lambda which=which: theirs.set_adapter(f"a{which}"))
        found["peft_forward"] = _timed(lambda: _forward(theirs))
        if number >= 0:
            for who, seconds in found.items():
                times[who].append(seconds)
    return times


def measure_cold(ours: VisionLanguageModel, theirs: PeftModel, adapters: Adapters, *, rounds: int) -> Times:
    """Measure the loading of one more adapter, another in each of alternating rounds; it is removed again, untimed.

    Ours is ``add`` of a name that is looked up in the local registry for the first time, its probe's receipt present.
    The floor reads the weights' file, hashes it and copies it once.
    """
    times: Times = {"ours": [], "peft": [], "floor": []}
    file = adapters.folder / WEIGHTS_NAME
    for number in range(-1, rounds):
        found = {"floor": _timed(lambda: _floor(file))}
        ref = adapters.cold.pop()
        _leave_receipt(ours, ref, ours.switcher.loaded_adapters[0])
        begun = time.perf_counter()
        loaded = ours.add(ref)
        found["ours"] = time.perf_counter() - begun
        ours.remove(loaded)
        found["peft"] = _timed(lambda: theirs.load_adapter(str(adapters.folder), adapter_name="more"))
        theirs.delete_adapter("more")
        if number >= 0:
            for who, seconds in found.items():
                times[who].append(seconds)
    return times


def measure_probe(ours: VisionLanguageModel, ref: str) -> float:
    """Return the seconds of a load that finds no receipt, and the values of the base alone."""
    begun = time.perf_counter()
    loaded = ours.add(ref)
    seconds = time.perf_counter() - begun
    ours.remove(loaded)
    return seconds


def figures(
    switching: dict[int, Times], loading: dict[int, Times], probed: Sequence[float], mixing: dict[str, Times]
) -> dict[str, float]:
    """Return the ratios of medians; where several counts of loaded_adapters were measured, the worst of them."""
    switch = {count: median(times["ours"]) for count, times in switching.items()}
    out = {f"switch_ms_{count}": 1e3 * seconds for count, seconds in switch.items()}
    out["switch_growth"] = switch[max(switch)] / switch[min(switch)]
    out["switch_vs_peft"] = min(median(times["peft"]) / switch[count] for count, times in switching.items())
    out["cold_vs_floor"] = max(median(times["ours"]) / median(times["floor"]) for times in loading.values())
    out["cold_vs_peft"] = min(median(times["peft"]) / median(times["ours"]) for times in loading.values())
    out["cold_with_probe_ms"] = 1e3 * median(probed)
    for rows, end in (("questions", ""), ("images", "_images")):
        mixed = median(mixing[rows]["mixed"])
        out[f"mixed_vs_separate{end}"] = median(mixing[rows]["separate"]) / mixed
        out[f"mixed_vs_peft{end}"] = median(mixing[rows]["peft"]) / mixed
    return out


def table(
    reached: dict[str, float], switching: dict[int, Times], loading: dict[int, Times], mixing: dict[str, Times]
) -> str:
    """Return all figures as text."""
    lines = []
    for title, found in (("switching", switching), ("loading one more", loading)):
        who = list(next(iter(found.values())))
        lines += ["", f"{title + ', ms':24}" + "".join(f"{name:>15}" for name in who)]
        for count, times in found.items():
            lines.append(f"{count:>3} loaded{'':12}" + "".join(f"{1e3 * median(times[name]):>15.3f}" for name in who))
    lines += ["", f"{'a batch of 8 adapters, s':24}" + "".join(f"{name:>15}" for name in mixing["questions"])]
    for rows, times in mixing.items():
        lines.append(f"{rows:24}" + "".join(f"{median(seconds):>15.3f}" for seconds in times.values()))
    lines += ["", f"{'':24}{'reached':>10}  wanted"]
    for name, value in reached.items():
        verdict = ""
        if (wanted := WANTED.get(name)) is not None:
            at_most = name in _AT_MOST
            enough = value <= wanted if at_most else value >= wanted
            verdict = f"{'<=' if at_most else '>='} {wanted:g}: {'yes' if enough else 'no'}"
        lines.append(f"{name:24}{value:>10.3g}  {verdict}")
    return "\n".join(lines)


def _leave_receipt(ours: VisionLanguageModel, ref: str, probed: LoadedAdapter) -> None:
    """Leave the receipt of one adapter for another name of it."""
    keep_receipt(ours.base, AdapterRegistry().resolve(ref).digest, probed.probe)


def _floor(file: Path) -> tuple[str, torch.Tensor]:
    data = bytearray(file.read_bytes())
    return hashlib.sha256(data).hexdigest(), torch.frombuffer(data, dtype=torch.uint8)


def _timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _forward(model: Any) -> torch.Tensor:
    """Return the logits of one token, for which the layers' own overhead counts most."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[5]]), use_cache=False).logits


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    parser.add_argument("--model", choices=SETUPS, default="b", help="base (b)")
    parser.add_argument("--loaded", default="1,8,64", help="numbers of loaded adapters to switch between (1,8,64)")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters (16)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds that count, of everything; one more warms up (15)"
    )
    parser.add_argument(
        "--mixed-rounds", type=int, default=3, help="rounds of mixed batches that count; one more warms up (3)"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of the answers of mixed batches (64)")
    parser.add_argument("--probes", type=int, default=3, help="loads without a receipt (3)")
    options = parser.parse_args(arguments)
    options.loaded = [int(number) for number in options.loaded.split(",")]
    counts = (*options.loaded, options.rounds, options.mixed_rounds, options.new_tokens, options.probes)
    if min(counts) < 1:
        parser.error("--loaded, --rounds, --mixed-rounds, --new-tokens and --probes must be at least 1")
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"error: {error}")

"""Evaluation side by side: plain transformers, our base over the same fixed batches, and the way of a run.

python -m benchmarks.evaluation --json evaluation.json      takes about 30 minutes on an idle CPU core
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, StoppingCriteriaList

from benchmarks.measure import BenchmarkError
from benchmarks.models import SETUPS
from benchmarks.results import machine
from benchmarks.rows import read_rows, write_questions
from finetune.assemble.batches import Batches
from finetune.assemble.loading import load_base
from finetune.core.example import Example, answer, as_images, ask
from finetune.evaluation.predict import Predictor, blanked
from finetune.tasks.vqa import VqaConfig, VqaTask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from finetune.assemble.base import Base
    from finetune.core.batch import Batch

LENGTHS = {"short": (1, 5), "long": (1, 64), "full": (64, 64)}  # tokens of an answer, from and to
BATCH_SIZE = {"a": 32, "b": 8, "tiny": 4}  # the default of a recipe, and that of the recipes for SmolVLM
NUM_IMAGES = {"a": 64, "b": 12, "tiny": 6}
WANTED = 1.5  # rows per second of ours over those of plain transformers, of a whole evaluation, on both models
WANTED_FOR = ("short", "long")
Seconds = dict[str, dict[str, dict[str, list[float]]]]


class LimitedTask(VqaTask):
    """Answers whose lengths are known: random weights end none, so each row has a limit of its own."""

    def limits(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of each answer."""
        return [example.meta["limit"] for example in examples]


class Ends(StoppingCriteria):
    """The end of each row at its own limit, for ``generate``."""

    def __init__(self, limits: Sequence[int], prompt: int):
        self._limits, self._prompt = torch.tensor(limits), prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows are at their end, [B]."""
        return input_ids.shape[1] - self._prompt >= self._limits


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The model and the processor as transformers loads them."""

    model: Any
    processor: Any

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Example], *, batch_size: int) -> list[str]:
        """Return the answer of each row, by ``generate`` over the batches of similar lengths that ours makes."""
        order = sorted(range(len(rows)), key=lambda i: (len(str(rows[i].prompt)), i))
        found: dict[int, str] = {}
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            found.update(zip(batch, self._answers([rows[i] for i in batch]), strict=True))
        return [found[i] for i in range(len(rows))]

    def _answers(self, rows: Sequence[Example]) -> list[str]:
        texts = [
            self.processor.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True) for row in rows
        ]
        images = [[_opened(source) for source in row.images] for row in rows]
        inputs = self.processor(
            text=texts, images=images, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        )
        limits, prompt = [row.meta["limit"] for row in rows], inputs["input_ids"].shape[1]
        made = self.model.generate(
            **inputs,
            max_new_tokens=max(limits),
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([Ends(limits, prompt)]),
        )
        ids = [row[:limit] for row, limit in zip(made[:, prompt:].tolist(), limits, strict=True)]
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table and write the figures."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            os.environ["FINETUNE_CACHE"] = str(Path(folder) / "cache")
            found = measure_model(name, Path(folder), options)
        figures |= ratios(name, found["seconds"])
        details[name] = found
        print(table(name, found, figures), flush=True)
    if options.json:
        whole = figures | {"details": {"machine": machine(torch.device("cpu")), "models": details}}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


def ratios(name: str, seconds: Seconds) -> dict[str, float]:
    """Return the ratios of rows per second of each way to those of plain transformers: medians over the rounds.

    Args:
        name: the name of the model.
        seconds: the CPU seconds of each round, by lengths of answers, part of the evaluation, and way.
    """
    found = {}
    for lengths, parts in seconds.items():
        parts = {**parts, "evaluation": _sums(parts)}
        for part, ways in parts.items():
            for who in ways.keys() - {"plain"}:
                rounds = zip(ways["plain"], ways[who], strict=True)
                found[f"{who}_vs_plain_{name}_{lengths}_{part}"] = statistics.median(
                    one / other for one, other in rounds
                )
    return dict(sorted(found.items()))


def _sums(parts: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """Return the seconds of all parts together, of each way in each round."""
    ways = next(iter(parts.values()))
    return {who: [sum(one) for one in zip(*(part[who] for part in parts.values()), strict=True)] for who in ways}


def measure_model(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the CPU seconds of each way, in alternating rounds, and the settings.

    Args:
        name: the name of the model.
        folder: the folder for its weights and rows.
        options: the options of the command.

    Raises:
        BenchmarkError: two ways gave a row different answers.
    """
    setup, batch_size = SETUPS[name], options.batch_size or BATCH_SIZE[name]
    path = str(setup.save(folder / "base", torch.float32))
    num_images = options.images or NUM_IMAGES[name]
    written = read_rows(write_questions(folder / "rows", setup, num_images=num_images))
    base = load_base(path, device="cpu")
    plain = Plain(
        model=AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval(),
        processor=AutoProcessor.from_pretrained(path),
    )
    for model in (base.model, plain.model):  # no token ends an answer
        model.generation_config.eos_token_id = model.generation_config.pad_token_id
    ways: dict[str, Callable[[Sequence[Example]], list[str]]] = {
        "plain": lambda rows: plain(rows, batch_size=batch_size),
        "batches": lambda rows: _ours(base, rows, batch_size=batch_size, fixed=True),
        "ours": lambda rows: _ours(base, rows, batch_size=batch_size, fixed=False),
    }
    ways = {who: ways[who] for who in options.ways.split(",")}
    seconds: Seconds = {}
    num_rows = {"images": len(written)}
    for lengths in options.lengths.split(","):
        rows = examples_of(written, *LENGTHS[lengths])
        blank, _ = blanked(rows)
        num_rows["blank"] = len(blank)
        measured = {part: measure(ways, of, rounds=options.rounds) for part, of in (("images", rows), ("blank", blank))}
        seconds[lengths] = measured
    return {
        "title": setup.title,
        "rows": num_rows,
        "images": num_images,
        "batch_size": batch_size,
        "seconds": seconds,
    }


def measure(
    ways: dict[str, Callable[[Sequence[Example]], list[str]]], rows: Sequence[Example], *, rounds: int
) -> dict[str, list[float]]:
    """Return the CPU seconds of each way in each round; one more round warms up.

    Raises:
        BenchmarkError: two ways gave a row different answers.
    """
    seconds: dict[str, list[float]] = {who: [] for who in ways}
    for number in range(rounds + 1):
        answers = {}
        for who, way in ways.items():
            gc.collect()
            begun = time.process_time()
            answers[who] = way(rows if number else rows[: len(rows) // 4])
            if number:
                seconds[who].append(time.process_time() - begun)
        for who, found in answers.items():
            for row, one, other in zip(rows, answers["plain"], found, strict=False):
                if one != other:
                    raise BenchmarkError(f"row {row.id}: all ways must give one answer, got {one!r}; {who}: {other!r}")
    return seconds


def examples_of(rows: Sequence[dict[str, str]], least: int, most: int) -> list[Example]:
    """Return rows whose answers have ``least`` to ``most`` tokens."""
    draw = random.Random(0)
    return [
        Example(
            id=str(number),
            messages=[*ask(row["question"]), answer("")],
            media=as_images([Path(row["image"])]),
            answers=[""],
            meta={"limit": draw.randint(least, most)},
        )
        for number, row in enumerate(rows)
    ]


class FixedBatches(LimitedTask):
    """The same task by ``generate`` over fixed batches, as of a class that predicts batches only."""

    def predict(self, model: Any, batch: Batch) -> list[Any]:
        """Return the answer of each row."""
        return list(self.answer(model, batch))


def _ours(base: Base, rows: Sequence[Example], *, batch_size: int, fixed: bool) -> list[str]:
    section = VqaConfig(max_new_tokens=max(row.meta["limit"] for row in rows))
    task = (FixedBatches if fixed else LimitedTask)(section, base.processor.tokenizer)
    batches = Batches(base.collator, None)
    predictor = Predictor(
        model=base.model,
        task=task,
        prompt_batch=batches.prompt_batch,
        prompt_parts=batches.prompt_parts,
        batch_size=batch_size,
    )
    return [str(found) for found in predictor([replace(row) for row in rows], title="benchmark")]


def _opened(source: Any) -> Image.Image:
    return Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source).convert("RGB")


def table(name: str, found: dict[str, Any], figures: dict[str, float]) -> str:
    """Return the table of a model for people."""
    num_rows = found["rows"] | {"evaluation": sum(found["rows"].values())}
    lines = [
        "",
        f"({name}) {found['title']}: {found['rows']['images']} rows about {found['images']} images, then "
        f"{found['rows']['blank']} with blank ones, in batches of {found['batch_size']}",
        f"{'answers':9}{'rows':12}{'':9}{'rows/CPU s':>11}{'ratio':>8}  wanted",
    ]
    for lengths, parts in found["seconds"].items():
        for part, ways in (parts | {"evaluation": _sums(parts)}).items():
            for who, seconds in ways.items():
                ratio = figures.get(f"{who}_vs_plain_{name}_{lengths}_{part}", 1.0)
                counts = who == "ours" and part == "evaluation" and lengths in WANTED_FOR
                wanted = f">= {WANTED}: {'yes' if ratio >= WANTED else 'no'}" if counts else ""
                rate = num_rows[part] / statistics.median(seconds)
                lines.append(f"{lengths:9}{part:12}{who:9}{rate:>11.2f}{ratio:>8.2f}  {wanted}".rstrip())
    return "\n".join(lines)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="a,b", help=f"models to measure, of {', '.join(BATCH_SIZE)} (a,b)")
    parser.add_argument("--lengths", default="short,long,full", help=f"of answers: {', '.join(LENGTHS)} (all)")
    parser.add_argument("--ways", default="plain,batches,ours", help="ways to evaluate, plain among them (all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count; a part of one more warms up (3)")
    parser.add_argument("--images", type=int, help="number of images; two rows ask about each (each model's own)")
    parser.add_argument("--batch-size", type=int, help="rows of a batch (each model's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

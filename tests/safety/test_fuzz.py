"""500 seeded mutations of manifest, config and header: each loads as the good one does, or raises an error of ours."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import FinetuneError
from tests.safety.forging import Forgery
from tests.safety.watching import MAX_MESSAGE, bounded

EACH = 50
_TOKENS = (
    *("NaN", "1e999", "-1", "0", "1.5", "true", "null", '""', "[]", "{}", "18446744073709551616", "9" * 5000),
    *('"\\ud800"', '"\\u0000"', "[" * 100, "]" * 100, '{"a":', ",", ":", '"', "\\", "\n", "\x00", "é", "\u202e"),
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e38, 1e308, 2**31, 2**63, 2**64, 10**400, "", "x", "..", "/", "\0"),
    *("lora", "r", "é" * 300, "\u202e", "4", "None", [], [[]], {}, {"": None}, {"a": {"b": []}}, [1], ["x"], [None]),
    *([0] * 1000, {str(i): i for i in range(1000)}, "x" * 100_000, [["x"] * 10] * 10),
)  # fmt: skip


def mutated_text(rng: random.Random, text: bytes) -> bytes:
    """Changes bytes without knowing what they mean."""
    start = rng.randrange(len(text))
    end = min(len(text), start + rng.choice((1, 2, 8, 200)))
    other = rng.randrange(len(text))
    return rng.choice(
        (
            lambda: text[:start] + bytes([text[start] ^ (1 << rng.randrange(8))]) + text[start + 1 :],
            lambda: text[:start] + bytes([rng.choice(b"0123456789")]) + text[start + 1 :],
            lambda: text[:start] + text[end:],
            lambda: text[:end] + text[start:end] + text[end:],
            lambda: text[:start] + rng.randbytes(end - start) + text[end:],
            lambda: text[:start] + rng.choice(_TOKENS).encode() + text[end:],
            lambda: text[:other] + text[start:end] + text[other:],
            lambda: text[:start],
        )
    )()


def mutated_value(rng: random.Random, value: Any) -> Any:
    """Changes one thing somewhere in parsed JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.16:
            return value | {rng.choice(("x", key.upper(), f"{key}.", "é", "a" * 5000)): value[key]}
        return value | {key: mutated_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.2:
            return value[:place] + value[place + 1 :]
        if kind < 0.4:
            return [*value, value[place]]
        return [*value[:place], mutated_value(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, str) and value and rng.random() < 0.4:
        return mutated_text(rng, value.encode()).decode(errors="replace")
    return rng.choice(_VALUES)


def manifest_text(rng: random.Random, forgery: Forgery) -> None:
    forgery.write()
    forgery.manifest_text(lambda text: mutated_text(rng, text.encode()))


def manifest_value(rng: random.Random, forgery: Forgery) -> None:
    forgery.config = forgery.good_config()
    forgery.write()
    forgery.manifest_text(lambda text: json.dumps(mutated_value(rng, json.loads(text))))


def config_text(rng: random.Random, forgery: Forgery) -> None:
    forgery.config = mutated_text(rng, json.dumps(forgery.good_config()).encode())
    forgery.write()


def config_value(rng: random.Random, forgery: Forgery) -> None:
    forgery.config = json.dumps(mutated_value(rng, forgery.good_config())).encode()
    forgery.write()


def header_text(rng: random.Random, forgery: Forgery) -> None:
    forgery.header_bytes(lambda text: mutated_text(rng, text))
    forgery.write()


def header_value(rng: random.Random, forgery: Forgery) -> None:
    forgery.header_bytes(lambda text: json.dumps(mutated_value(rng, json.loads(text))).encode())
    forgery.write()


def description(rng: random.Random, forgery: Forgery) -> None:
    """What the manifest says of the adapter, with the config that goes with it."""
    forgery.manifest["adapter"] = mutated_value(rng, forgery.adapter)
    forgery.write()


KINDS: dict[str, tuple[Callable[[random.Random, Forgery], None], str]] = {
    f"{kind.__name__} of {of}": (kind, of)
    for kind in (manifest_text, manifest_value, config_text, config_value, description)
    for of in ("lora", "parts")
    if (kind.__name__, of) not in {("config_text", "lora"), ("config_value", "parts")}
} | {"header_text of lora": (header_text, "lora"), "header_value of parts": (header_value, "parts")}


@pytest.mark.parametrize("name", KINDS)
def test_no_mutation_gets_in(stage, tmp_path, canary, name):
    mutate, of = KINDS[name]
    stage.is_whole = False
    seen: Counter[str] = Counter()
    for seed in range(EACH):
        folder: Path = tmp_path / "adapter"
        mutate(random.Random(f"{name} {seed}"), Forgery(stage.good[of], folder))
        with bounded(folder, canary):
            outcome = offer(stage, folder, of, where=f"{name}, seed {seed}")
        seen[outcome.replace(str(folder), "")[:60]] += 1
        if outcome == "loaded" or "the probe" in outcome:  # all others end before the model is touched: see below
            stage.check_untouched()
        shutil.rmtree(folder)
    stage.check_untouched()
    stage.check_next(of)
    stage.is_whole = True
    assert len(seen) >= 5, f"all end in the same few ways: {seen}"


def offer(stage, folder: Path, of: str, *, where: str) -> str:
    """Return the message of the refusal, or ``loaded``."""
    try:
        loaded = stage.vlm.add(folder)
    except FinetuneError as error:
        text = str(error)
        assert text.isprintable() and len(text) <= MAX_MESSAGE, f"{where}: {text[:2000]!r}"
        return text
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__} is no error of ours") from error
    with stage.vlm.using(folder):
        assert torch.equal(stage.answer(), stage.answers[of]), f"{where}: it was let in and answers otherwise"
    stage.vlm.remove(loaded)
    return "loaded"

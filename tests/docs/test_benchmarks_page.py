"""docs/benchmarks.md, docs/hardware.md and README: their numbers are those that benchmarks/measured/ keeps."""

import json

import pytest

from tests.docs_code import DOCS, README, ROOT

MEASURED = ROOT / "benchmarks" / "measured"


def measured(name):
    return json.loads((MEASURED / f"2026-{name}.json").read_text(encoding="utf-8"))


def start(case):
    return f"{measured('11-30-cpu-startup')[f'{case}_vs_floor']:.2f}".lstrip("0")


def text(page):
    return " ".join((DOCS / page).read_text(encoding="utf-8").split())


def evaluation_rows(page):
    """Return the same of the section about evaluations, in whose table each row has a number for each model."""
    a, b = (measured(f"12-01-cpu-evaluation-{model}") for model in "ab")
    labels = {"images": "rows with their images", "blank": "blank images", "evaluation": "the whole evaluation"}
    for lengths, tokens in {"short": 5, "long": 64}.items():
        for part, label in labels.items():
            one, other = (of[f"ours_vs_plain_{name}_{lengths}_{part}"] for name, of in (("a", a), ("b", b)))
            yield page, f"1 to {tokens} tokens, {label} | {{:.2f}} | {other:.2f} |", one
    yield page, "(a) reaches {:.2f}. On (a)", a["ours_vs_plain_a_full_evaluation"]
    yield page, "our base reaches {:.2f} on long answers", a["batches_vs_plain_a_long_evaluation"]


def rows():
    """Return the page, its words around a number, and the number that was measured."""
    a, b, earlier = measured("12-01-cpu-a"), measured("12-01-cpu"), measured("11-22-cpu")
    swap, writes = measured("11-23-cpu-swap-switching"), measured("11-23-cpu-registry-writes")
    threads, later = measured("12-01-cpu-threads"), measured("12-01-cpu-b")
    memory = b["details"]["models"]["b"]["contestants"]
    with_store = later["details"]["models"]["b"]["contestants"]["stored"]
    page = "benchmarks.md"
    return [
        *evaluation_rows(page),
        (page, "(a) without the feature store, trl | {:.2f} |", a["uncached_vs_trl"]),
        (page, "without the feature store, bare loop | .{:.0f} |", 100 * a["uncached_vs_bare"]),
        (page, "(b) with the feature store, trl, one tile an image | {:.1f} |", b["stored_vs_trl"]),
        (page, "trl, four tiles and the whole image | {:.1f} |", b["stored_vs_trl_4_tiles"]),
        (page, "the trainable part alone on ready tensors | {:.2f} |", b["stored_vs_floor"]),
        (page, "with the time to fill the store, trl | {:.2f} |", later["three_epochs_vs_trl"]),
        (page, "(b) reached {:.1f} and", earlier["stored_vs_trl"]),
        (page, "and {:.1f} on 2026-11-22", earlier["stored_vs_trl_4_tiles"]),
        (page, "Filling the store takes {:.2f} times", measured("12-01-cpu-filling")["filling_vs_tower"]),
        (page, "takes {:.2f} times as long as one such run", measured("11-23-cpu-sweep")["sweep_vs_one_run"]),
        (page, "`set_adapter`, divided by that | {:.0f} |", swap["switch_vs_peft"]),
        (page, "copying its file | {:.1f} |", swap["cold_vs_floor"]),
        (page, "`load_adapter`, divided by that | {:.1f} |", swap["cold_vs_peft"]),
        (page, "--probes 5`) | {:.1f} s |", measured("12-01-cpu-swap-cold")["cold_with_probe_ms"] / 1000),
        (page, "one at a time, divided by one batch | {:.1f} |", measured("11-23-cpu-swap")["mixed_vs_separate"]),
        (page, "answered {:.1f} times as many", measured("11-23-cpu-serving")["together_vs_one_by_one"]),
        (page, "at most {} requests with the hint", measured("11-23-cpu-registry")["cold_resolve_requests_10000"]),
        (page, "on two CPU cores, a durable publish takes {:.1f} ms", writes["publish_ms"]),
        (page, "takes {:.2f} times as long as upon one", writes["publish_10000_vs_1"]),
        (page, "publishes {:.0f} versions a second", writes["publishes_per_second_by_1"]),
        ("hardware.md", "TRL 1.16 with PEFT | {:.2f} |", memory["trl"]["peak_bytes"] / 1e9),
        ("hardware.md", "without the feature store | {:.2f} |", memory["ours"]["peak_bytes"] / 1e9),
        ("hardware.md", "this package, with it | {:.2f} |", with_store["peak_bytes"] / 1e9),
        (README, "takes {:.0f} times as long", swap["switch_vs_peft"]),
        ("hardware.md", "| 2 | as OpenMP does by default | {:.0f} |", threads["idle 2 openmp"]["rows_per_s"]),
        ("hardware.md", "`OMP_WAIT_POLICY=PASSIVE` | {:.0f} |", threads["idle 2 passive"]["rows_per_s"]),
        ("hardware.md", "| 2 | ours | {:.0f} |", threads["idle 2 ours"]["rows_per_s"]),
        (README, "TRL 1.16 takes {:.2f} times as long", a["uncached_vs_trl"]),
        (README, "{:.1f} times on an AMD EPYC", b["stored_vs_trl"]),
        (README, "verify one takes {:.1f} times", swap["cold_vs_floor"]),
        (README, "publish takes {:.1f} ms", writes["publish_ms"]),
        (README, "at most {} requests", measured("11-23-cpu-registry")["cold_resolve_requests_10000"]),
    ]


@pytest.mark.parametrize(("page", "words", "value"), rows())
def test_numbers_are_measured(page, words, value):
    assert words.format(value) in text(page)


def test_starts_take_what_was_measured():
    page = text("benchmarks.md")
    assert f"to the end of the process | {start('ask')} |" in page
    assert f"attaches a LoRA | {start('train')} |" in page
    assert f"the script is a FastAPI app | {start('serve')} |" in page


def test_switching_takes_what_was_measured():
    swap = measured("11-23-cpu-swap-switching")
    shown = [f"{swap[f'switch_ms_{count}']:.2f}".lstrip("0") for count in (1, 64)]
    assert f"1 and 64 loaded | {shown[0]} and {shown[1]} ms |" in text("benchmarks.md")
    assert f"{shown[0]} ms with 1 or 64" in text(README)

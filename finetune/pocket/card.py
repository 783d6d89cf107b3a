"""The pocket model's card: what it scores on held-out worlds, per question type, beside what needs no picture."""

from typing import Any

THRESHOLD = 0.75  # of all held-out questions
ABOVE_TEXT_ONLY = 0.15  # of every question type
BLANK_COST = 0.25  # what a blank picture must cost over all


def text_only(kind: dict[str, float]) -> float:
    """Returns the better of two ways to answer without the picture: the model on grey, and the majority answer."""
    return max(kind["blank_image"], kind["majority"])


def shortfalls(scores: dict[str, Any]) -> list[str]:
    """Returns what of the card's promises ``scores`` (of the held-out world, as JSON) do not keep."""
    out = []
    if scores["exact_match"] < THRESHOLD:
        out.append(f"overall {scores['exact_match']:.3f} is below {THRESHOLD}")
    if scores["exact_match"] - scores["blank_image"] < BLANK_COST:
        out.append(f"a blank picture costs only {scores['exact_match'] - scores['blank_image']:.3f}")
    for name, kind in scores["by_kind"].items():
        if kind["exact_match"] < text_only(kind) + ABOVE_TEXT_ONLY:
            out.append(f"{name}: {kind['exact_match']:.3f} against {text_only(kind):.3f} without the picture")
    return out


def write_card(scores: dict[str, Any], *, parameters: int, minutes: float | None) -> str:
    """Returns the card as Markdown."""
    lines = [
        "# pocket",
        "",
        f"A vision-language model of {parameters / 1e6:.2f} M parameters for tests and demonstrations: class "
        "`FastVlmForConditionalGeneration`, a ConvNeXt tower for 64 x 64 pictures (16 image tokens), a two-layer "
        "projector, a Qwen2 of 4 layers and 192 channels, a byte-level BPE of 1,200 tokens. Trained only on "
        "pictures that a program drew (`finetune/pocket/world.py`); `python recipes/pretrain.py` rebuilds it"
        + (f" ({minutes:.0f} minutes on 2 shared CPU cores when these weights were made)." if minutes else "."),
        "It knows coloured shapes and nothing else. Apache-2.0.",
        "",
        f"Held-out worlds, exact match by greedy generation, {scores['n']} questions: **{scores['exact_match']:.3f}** "
        f"({scores['interval'][0]:.3f} to {scores['interval'][1]:.3f}); with a grey picture "
        f"{scores['blank_image']:.3f}; majority answer of each type {scores['majority']:.3f}.",
        "",
        "| question type | exact match | grey picture | majority answer | questions |",
        "|---|---|---|---|---|",
    ]
    for name, kind in scores["by_kind"].items():
        lines.append(
            f"| {name} | {kind['exact_match']:.3f} | {kind['blank_image']:.3f} | {kind['majority']:.3f} | {kind['n']} |"
        )
    return "\n".join(lines) + "\n"

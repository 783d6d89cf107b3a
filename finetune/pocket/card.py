"""The card of the pocket model: its scores on held-out worlds by question type, beside scores without the image."""

from dataclasses import dataclass
from typing import Any

THRESHOLD = 0.75  # of all held-out questions
ABOVE_TEXT_ONLY = 0.15  # of every question type
BLANK_COST = 0.25  # what a blank image must cost over all


@dataclass(frozen=True)
class _Part:
    """The scores of all questions, or of one type, by the model and by two baselines without the image."""

    value: float
    blank_image: float
    majority: float
    n: int

    @classmethod
    def of(cls, scores: dict[str, Any]) -> "_Part":
        """Return the numbers of ``Scores`` as JSON, or of a question type in them, of their only metric."""
        ((name, found),) = scores["values"].items()
        blank, majority = (scores["baselines"][of][name]["value"] for of in ("blank_image", "majority"))
        return cls(found["value"], blank, majority, scores["n"])

    @property
    def text_only(self) -> float:
        """Return the better of two baselines without the image: the model on grey, and the majority answer."""
        return max(self.blank_image, self.majority)


def shortfalls(scores: dict[str, Any]) -> list[str]:
    """Return the thresholds of the card that ``scores`` (of the held-out world, as JSON) do not reach."""
    whole, out = _Part.of(scores), []
    if whole.value < THRESHOLD:
        out.append(f"overall {whole.value:.3f} is below {THRESHOLD}")
    if whole.value - whole.blank_image < BLANK_COST:
        out.append(f"a blank image costs only {whole.value - whole.blank_image:.3f}")
    for name, part in _question_types(scores):
        if part.value < part.text_only + ABOVE_TEXT_ONLY:
            out.append(f"{name}: {part.value:.3f} against {part.text_only:.3f} without the image")
    return out


def _question_types(scores: dict[str, Any]) -> list[tuple[str, _Part]]:
    return [(name, _Part.of(part)) for name, part in scores["by_question_type"].items()]


def write_card(scores: dict[str, Any], *, parameters: int, minutes: float | None) -> str:
    """Return the card as Markdown."""
    whole = _Part.of(scores)
    (low, high) = next(iter(scores["values"].values()))["interval"]
    lines = [
        "# pocket",
        "",
        f"A vision-language model of {parameters / 1e6:.2f} M parameters for tests and demonstrations: class "
        "`FastVlmForConditionalGeneration`, a ConvNeXt tower for 64 x 64 images (16 image tokens), a two-layer "
        "projector, a Qwen2 of 4 layers and 192 channels, a byte-level BPE of 1,200 tokens. Trained only on "
        "images that a program drew (`finetune/pocket/world.py`); `python recipes/pretrain.py` rebuilds it"
        + (f" ({minutes:.0f} minutes on 2 shared CPU cores when these weights were made)." if minutes else "."),
        "It knows coloured shapes and nothing else. Apache-2.0.",
        "",
        f"Held-out worlds, exact match by greedy generation, {whole.n} questions: **{whole.value:.3f}** "
        f"({low:.3f} to {high:.3f}); with a grey image {whole.blank_image:.3f}; majority answer of each type "
        f"{whole.majority:.3f}.",
        "",
        "| question type | exact match | grey image | majority answer | questions |",
        "|---|---|---|---|---|",
    ]
    for name, part in _question_types(scores):
        lines.append(f"| {name} | {part.value:.3f} | {part.blank_image:.3f} | {part.majority:.3f} | {part.n} |")
    return "\n".join(lines) + "\n"

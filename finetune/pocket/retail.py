"""Synthetic product images: one garment on a light ground, some with a price tag."""

import numpy as np

from finetune.pocket.drawing import (
    PATTERNS,
    SIDE,
    fill_pattern,
    finish,
    jitter_color,
    paint,
    polygon_mask,
    random_for,
    smooth_noise,
)
from finetune.pocket.scene import Question, Scene

# Left halves of symmetric garments in a unit square, x to the right and y down.
_HALVES: dict[str, list[tuple[float, float]]] = {
    "shirt": [(0.42, 0.12), (0.28, 0.16), (0.04, 0.34), (0.13, 0.48), (0.26, 0.38), (0.26, 0.9)],
    "dress": [(0.42, 0.06), (0.34, 0.08), (0.32, 0.24), (0.38, 0.42), (0.14, 0.94)],
    "pants": [(0.3, 0.06), (0.24, 0.5), (0.2, 0.95), (0.42, 0.95), (0.48, 0.34)],
    "skirt": [(0.36, 0.2), (0.34, 0.28), (0.12, 0.82)],
    "hat": [(0.36, 0.26), (0.3, 0.62), (0.04, 0.68), (0.06, 0.76)],
}
GARMENTS = (*_HALVES, "sock")
_SOCK = [(0.36, 0.06), (0.62, 0.06), (0.62, 0.56), (0.94, 0.72), (0.94, 0.9), (0.6, 0.92), (0.36, 0.7)]
_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black")


def draw_product(seed: int, split: str, index: int) -> Scene:
    """Return one product image with captions, and questions on garment, colour, pattern and price tag."""
    rng = random_for(seed, "retail", split, index)
    garment, color = str(rng.choice(GARMENTS)), str(rng.choice(_COLORS))
    pattern = str(rng.choice(PATTERNS))
    image = np.empty((SIDE, SIDE, 3))
    image[:] = rng.uniform(205, 250) + rng.normal(0, 3, 3)
    image += smooth_noise(rng, 3)[..., None] * rng.uniform(0, 4)
    size = rng.uniform(46, 58)
    left, top = rng.uniform(1, SIDE - size - 1, 2)
    outline = [(left + x * size, top + y * size) for x, y in _outline(rng, garment)]
    ink = jitter_color(rng, color, 10)
    second = jitter_color(rng, "white" if color in ("black", "brown", "blue", "purple") else "black", 8)
    shade = (1 + 0.08 * smooth_noise(rng, 4))[..., None]
    fill = fill_pattern(rng, pattern, ink, 0.3 * ink + 0.7 * second, period=rng.uniform(6, 9)) * shade
    shadow = polygon_mask([(x + 1.5, y + 1.5) for x, y in outline])
    paint(image, shadow * 0.25, np.array([90.0, 90.0, 95.0]))
    paint(image, polygon_mask(outline), fill)
    tagged = bool(rng.random() < 0.5)
    if tagged:
        _hang_tag(rng, image)
    questions = [
        Question(question_type="garment", text="Which garment is this?", answer=garment),
        Question(question_type="color", text="What color is the garment?", answer=color),
        Question(question_type="pattern", text="What pattern does the garment have?", answer=pattern),
        Question(question_type="tag", text="Is there a price tag?", answer="yes" if tagged else "no"),
    ]
    what = f"{pattern} {color} {garment}" if garment == "pants" else f"a {pattern} {color} {garment}"
    captions = [
        what + (" with a price tag" if tagged else ""),
        f"{color} {garment} with a {pattern} pattern" + (" and a price tag" if tagged else ""),
    ]
    return Scene(image=finish(rng, image, noise=rng.uniform(1, 5)), questions=questions, captions=captions)


def _outline(rng: np.random.Generator, garment: str) -> list[tuple[float, float]]:
    if garment == "sock":
        points = _SOCK if rng.random() < 0.5 else [(1 - x, y) for x, y in _SOCK]
    else:
        half = _HALVES[garment]
        points = [*half, *((1 - x, y) for x, y in reversed(half))]
    stretch = rng.uniform(0.88, 1.0)
    return [(0.5 + (x - 0.5) * stretch + rng.normal(0, 0.008), y + rng.normal(0, 0.008)) for x, y in points]


def _hang_tag(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw a small white tag with two dark lines, on a string."""
    x, y = rng.uniform(6, SIDE - 18), rng.uniform(8, SIDE - 20)
    paint(image, polygon_mask([(x + 4, y - 6), (x + 5, y - 6), (x + 6.5, y), (x + 5.5, y)]), np.full(3, 60.0))
    paint(
        image,
        polygon_mask([(x - 0.8, y - 0.8), (x + 11.8, y - 0.8), (x + 11.8, y + 14.8), (x - 0.8, y + 14.8)]),
        np.full(3, 70.0),
    )
    paint(image, polygon_mask([(x, y), (x + 11, y), (x + 11, y + 14), (x, y + 14)]), np.full(3, 252.0))
    for row in (4, 8):
        paint(
            image,
            polygon_mask([(x + 2, y + row), (x + 9, y + row), (x + 9, y + row + 1.6), (x + 2, y + row + 1.6)]),
            np.full(3, 40.0),
        )

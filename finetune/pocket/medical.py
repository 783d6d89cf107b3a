"""Synthetic medical phantoms: ultrasound-like and X-ray-like images with at most one lesion, and cell smears."""

import math

import numpy as np

from finetune.pocket.drawing import SIDE, ellipse_mask, finish, paint, random_for, smooth_noise
from finetune.pocket.scene import Question, Scene

_NUMBERS = ("zero", "one", "two", "three", "four", "five")


def draw_phantom(seed: int, split: str, index: int) -> Scene:
    """Return one phantom: three in four show tissue, the others a smear with cells to count."""
    rng = random_for(seed, "medical", split, index)
    # The index also chooses the question (see domains.py), so the style must not depend on its parity.
    style = rng.choice(["ultrasound", "x-ray", "smear"], p=[0.4, 0.35, 0.25])
    return _smear(rng) if style == "smear" else _tissue(rng, style)


def _tissue(rng: np.random.Generator, style: str) -> Scene:
    ultrasound = style == "ultrasound"
    grey = np.full((SIDE, SIDE), 95.0 if ultrasound else 60.0)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    if ultrasound:
        for _ in range(3):  # layers of tissue
            grey += 14 * np.sin(rng.uniform(8, 22) * (y + 0.08 * np.sin(6 * x + rng.uniform(0, 6))) + rng.uniform(0, 6))
    else:
        for side in (0.3, 0.7):  # two dark lung fields in a lighter chest
            lung = ellipse_mask(side * SIDE + rng.normal(0, 1), SIDE * 0.5, SIDE * 0.16, SIDE * 0.36)
            grey += (1 - lung) * 38
        for row in np.linspace(0.15, 0.85, 6):  # ribs
            grey += 9 * np.exp(-(((y - row - 0.1 * (x - 0.5) ** 2) / 0.018) ** 2))
    present = bool(rng.random() < 0.7)
    questions = [Question(question_type="lesion", text="Is there a lesion?", answer="yes" if present else "no")]
    if present:
        grey, more = _add_lesion(rng, grey, ultrasound)
        questions += more
    facts = {question.question_type: question.answer for question in questions}
    organ = "tissue" if ultrasound else "chest"
    if present:
        captions = [
            f"a {organ} scan with a {facts['size']} {facts['margin']} lesion on the {facts['side']} side",
            f"a {facts['size']} lesion of {facts['margin']} margin on the {facts['side']} side of the {organ}",
        ]
    else:
        captions = [f"a {organ} scan without a lesion", f"a normal scan of the {organ}"]
    speckle = rng.normal(1, 0.16 if ultrasound else 0.05, grey.shape)
    image = np.repeat((grey * speckle + smooth_noise(rng, 5) * 5)[..., None], 3, axis=-1)
    return Scene(image=finish(rng, image, noise=3, blur=0.4), questions=questions, captions=captions)


def _add_lesion(rng: np.random.Generator, grey: np.ndarray, ultrasound: bool) -> tuple[np.ndarray, list[Question]]:
    large, irregular, left = rng.random(3) < 0.5
    radius = rng.uniform(9.5, 12) if large else rng.uniform(4.5, 6)
    cx = SIDE * (rng.uniform(0.2, 0.36) if left else rng.uniform(0.64, 0.8))
    cy = SIDE * rng.uniform(0.28, 0.72)
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    angle, distance = np.arctan2(y - cy, x - cx), np.hypot(x - cx, y - cy)
    edge = np.full_like(angle, radius)
    if irregular:
        spikes = int(rng.integers(6, 10))
        edge *= 1 + 0.38 * np.sin(spikes * angle + rng.uniform(0, 6))
    else:
        edge *= 1 + 0.1 * np.sin(2 * angle + rng.uniform(0, 6))
    mask = np.clip((edge - distance) / 1.2 + 0.5, 0, 1)
    target = 28.0 if ultrasound else 165.0
    grey = grey + mask * (target - grey) * rng.uniform(0.8, 0.95)
    return grey, [
        Question(
            question_type="margin",
            text="Is the margin of the lesion smooth or irregular?",
            answer="irregular" if irregular else "smooth",
        ),
        Question(question_type="size", text="Is the lesion small or large?", answer="large" if large else "small"),
        Question(question_type="side", text="On which side is the lesion?", answer="left" if left else "right"),
    ]


def _smear(rng: np.random.Generator) -> Scene:
    image = np.empty((SIDE, SIDE, 3))
    image[:] = np.array([238, 218, 224]) + rng.normal(0, 4, 3)
    image += smooth_noise(rng, 4)[..., None] * 4
    wanted = int(rng.integers(0, 6))
    cells: list[tuple[float, float]] = []
    for _ in range(200):
        if len(cells) == wanted:
            break
        x, y = rng.uniform(9, SIDE - 9, 2)
        if all(math.hypot(x - a, y - b) > 15 for a, b in cells):
            cells.append((x, y))
    for _ in range(int(rng.integers(2, 7))):  # small pale platelets that are no cells
        x, y = rng.uniform(4, SIDE - 4, 2)
        spot = ellipse_mask(x, y, 1.4, 1.4)
        paint(image, spot * 0.7, np.array([190, 150, 200]))
    for x, y in cells:
        r = rng.uniform(5.5, 7)
        body = ellipse_mask(x, y, r, r * rng.uniform(0.85, 1.0), rng.uniform(0, 3))
        paint(image, body * 0.9, np.array([200, 120, 160]) + rng.normal(0, 8, 3))
        nucleus = ellipse_mask(x + rng.normal(0, 0.7), y + rng.normal(0, 0.7), r * 0.55, r * 0.5)
        paint(image, nucleus, np.array([95, 40, 130]) + rng.normal(0, 8, 3))
    question = Question(question_type="cells", text="How many cells are there?", answer=_NUMBERS[len(cells)])
    number = "no" if not cells else _NUMBERS[len(cells)]
    what = f"{number} {'cell' if len(cells) == 1 else 'cells'}"
    captions = [f"an image of {what}", f"{what} and small dots"]
    return Scene(image=finish(rng, image, noise=4, blur=0.3), questions=[question], captions=captions)

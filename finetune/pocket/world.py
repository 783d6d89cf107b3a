"""The procedural world of the pocket model's pretraining: coloured, patterned shapes on cluttered grounds.

``draw_scene(seed, split, index)`` is a pure function. Splits never share a seed.
"""

import numpy as np

from finetune.pocket.drawing import (
    COLORS,
    PATTERNS,
    SHAPES,
    SIDE,
    fill_pattern,
    finish,
    jitter_color,
    paint,
    random_for,
    shape_mask,
    smooth_noise,
)
from finetune.pocket.questions import ask_everything
from finetune.pocket.scene import Scene, Thing

CELLS = 8  # patches a side
# Dense labels of a patch: shape, colour and pattern of the object that covers it; 0 is "no object".
CELL_CLASSES = (len(SHAPES) + 1, len(COLORS) + 1, len(PATTERNS) + 1)


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """Return scene ``index`` of ``split``, with all the questions that have one clear answer."""
    rng = random_for(seed, split, index)
    ground_name = str(rng.choice(list(COLORS)))
    grey = rng.random() < 0.1
    scene_type = rng.choice(["things", "group", "single"], p=[0.5, 0.27, 0.23])
    things = {"things": _some_things, "group": _a_group, "single": _a_single_thing}[scene_type](rng, ground_name)
    image = _ground(rng, ground_name)
    owner = np.full((SIDE, SIDE), -1)
    for number, thing in enumerate(things):
        angle = float(rng.uniform(-0.25, 0.25))
        mask = shape_mask(thing.shape, thing.x, thing.y, thing.radius, angle)
        ink = jitter_color(rng, thing.color)
        second = 0.2 * ink + 0.8 * jitter_color(rng, _tint(rng, thing.color))
        paint(image, mask, fill_pattern(rng, thing.pattern, ink, second))
        owner[mask > 0.5] = number
    if grey:
        image[:] = image.mean(axis=-1, keepdims=True)
    image = (image - 128) * rng.uniform(0.85, 1.1) + 128 + rng.normal(0, 5)
    blur = float(rng.uniform(0.2, 0.8)) if rng.random() < 0.3 else 0.0
    image = finish(rng, image, noise=float(rng.uniform(0, 7)), blur=blur)
    questions = ask_everything(rng, scene_type, things, None if grey else ground_name, colored=not grey)
    return Scene(image=image, questions=questions, cells=_cells(owner, things, grey), mask=owner >= 0)


def _other_color(rng: np.random.Generator, *taken: str) -> str:
    close = {
        "black": "brown gray", "brown": "black red", "gray": "white black", "white": "gray yellow pink",
        "red": "orange brown pink", "orange": "red yellow", "yellow": "orange white",
        "pink": "white purple red", "purple": "blue pink", "blue": "purple", "green": "blue",
    }  # fmt: skip
    banned = set(taken).union(*(close[name].split() for name in taken))
    return str(rng.choice([c for c in COLORS if c not in banned]))


def _tint(rng: np.random.Generator, ink: str) -> str:
    """Return the ground of a pattern, black or white, so that the colour of a patterned object is clear."""
    return {"black": "white", "white": "black", "brown": "white", "yellow": "black"}.get(
        ink, str(rng.choice(["black", "white"]))
    )


def _ground(rng: np.random.Generator, name: str) -> np.ndarray:
    image = np.empty((SIDE, SIDE, 3), np.float32)
    image[:] = jitter_color(rng, name)
    if rng.random() < 0.5:
        image += smooth_noise(rng, int(rng.integers(2, 7)))[..., None] * rng.uniform(3, 13)
    if rng.random() < 0.35:
        for _ in range(int(rng.integers(2, 9))):  # clutter: faint specks
            x, y = rng.uniform(0, SIDE, 2)
            speck = shape_mask("circle", float(x), float(y), float(rng.uniform(0.6, 1.6)))
            paint(image, speck * 0.8, image.mean(axis=(0, 1)) + rng.normal(0, 35, 3))
    return image


def _place(rng: np.random.Generator, taken: list[Thing], radius: float) -> tuple[float, float] | None:
    for _ in range(40):
        x, y = rng.uniform(radius + 1, SIDE - radius - 1, 2)
        if all((x - t.x) ** 2 + (y - t.y) ** 2 > (radius + t.radius + 1.5) ** 2 for t in taken):
            return float(x), float(y)
    return None


def _some_things(rng: np.random.Generator, ground: str) -> list[Thing]:
    wanted = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.4, 0.25, 0.15]))
    things: list[Thing] = []
    sizes = sorted(rng.choice(["large", "small"], wanted).tolist())
    for size in sizes:  # the large ones first, while there is room
        radius = float(rng.uniform(12, 15) if size == "large" else rng.uniform(6.5, 8.5))
        shape, color = str(rng.choice(SHAPES)), _other_color(rng, ground)
        place = _place(rng, things, radius)
        if place is None or any((t.shape, t.color) == (shape, color) for t in things):
            continue
        pattern = str(rng.choice(PATTERNS)) if size == "large" else "plain"
        things.append(Thing(shape, color, pattern, size, *place, radius))
    return things


def _a_group(rng: np.random.Generator, ground: str) -> list[Thing]:
    things: list[Thing] = []
    looks = [(str(rng.choice(SHAPES)), _other_color(rng, ground))]
    second = (str(rng.choice(SHAPES)), _other_color(rng, ground))
    counts = [int(rng.integers(1, 6))]
    if second[0] != looks[0][0] and second[1] != looks[0][1] and rng.random() < 0.6:
        looks.append(second)
        counts.append(int(rng.integers(1, 4)))
    radius = float(rng.uniform(5.5, 7.5))
    for (shape, color), count in zip(looks, counts, strict=True):
        for _ in range(count):
            place = _place(rng, things, radius)
            if place is not None:
                things.append(Thing(shape, color, "plain", "small", *place, radius))
    return things


def _a_single_thing(rng: np.random.Generator, ground: str) -> list[Thing]:
    radius = float(rng.uniform(16, 27))
    place = _place(rng, [], radius) or (SIDE / 2, SIDE / 2)
    shape, color, pattern = str(rng.choice(SHAPES)), _other_color(rng, ground), str(rng.choice(PATTERNS))
    return [Thing(shape, color, pattern, "large", *place, radius)]


def _cells(owner: np.ndarray, things: list[Thing], grey: bool) -> np.ndarray:
    """Return [CELLS, CELLS, 3]: the classes of the object that covers most of each patch, 0 for none.

    The colour of a grey object is -100, which cross entropy ignores.
    """
    step = SIDE // CELLS
    cells = np.zeros((CELLS, CELLS, 3), np.int8)
    colors = list(COLORS)
    for row in range(CELLS):
        for column in range(CELLS):
            patch = owner[row * step : (row + 1) * step, column * step : (column + 1) * step]
            numbers, counts = np.unique(patch[patch >= 0], return_counts=True)
            if counts.size and counts.max() >= 12:
                thing = things[int(numbers[counts.argmax()])]
                color = -100 if grey else colors.index(thing.color) + 1
                cells[row, column] = (
                    SHAPES.index(thing.shape) + 1,
                    color,
                    PATTERNS.index(thing.pattern) + 1,
                )
    return cells

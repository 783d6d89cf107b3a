"""Questions about a scene of the procedural world, each with one clear answer, with yes and no in balance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.pocket.drawing import COLORS, SHAPES, SIDE
from finetune.pocket.scene import Question

if TYPE_CHECKING:
    import numpy as np

    from finetune.pocket.scene import Thing

QUESTION_TYPES = (
    "shape", "color", "pattern", "size", "count", "position", "relation",
    "exists", "check", "background", "choice", "caption",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

_WORDINGS = {
    "shape": ("What shape is the {0} object?", "Which shape is {0}?", "Name the shape that is {0}."),
    "shape_single": ("What shape is this?", "Which shape do you see?", "What is in the picture?"),
    "color": ("What color is the {0}?", "Which color does the {0} have?", "Name the color of the {0}."),
    "pattern": ("What pattern does the {0} have?", "Which pattern is on the {0}?", "How is the {0} patterned?"),
    "size": ("Is the {0} small or large?", "How big is the {0}?", "What size is the {0}?"),
    "count": ("How many {0}s are there?", "Count the {0}s.", "What is the number of {0}s?"),
    "position": ("Where is the {0}?", "In which part of the picture is the {0}?", "Where do you see the {0}?"),
    "exists": ("Is there a {0}?", "Do you see a {0}?", "Does the picture show a {0}?"),
    "background": ("What color is the background?", "Which color is behind everything?", "Name the ground color."),
    "caption": ("Describe the picture.", "What does the picture show?", "Caption this picture."),
}  # fmt: skip


def _word(rng: np.random.Generator, name: str, *parts: str) -> str:
    wordings = _WORDINGS[name]
    return wordings[int(rng.integers(len(wordings)))].format(*parts)


def region(x: float, y: float) -> str | None:
    """Return the name of the ninth of the image with the point (x, y), in pixels; None near a border."""
    third, margin = SIDE / 3, 2.5
    for value in (x, y):
        if any(abs(value - line) < margin for line in (third, 2 * third)):
            return None
    row = ("top", "", "bottom")[int(y // third)]
    column = ("left", "", "right")[int(x // third)]
    return " ".join(part for part in (row, column) if part) or "center"


def ask_everything(
    rng: np.random.Generator, scene_type: str, things: list[Thing], ground: str | None, *, colored: bool
) -> list[Question]:
    """Return the questions of one scene in random order, at most two of a type.

    Args:
        rng: the generator of the scene.
        scene_type: the type of the scene: ``things``, ``group`` or ``single``.
        things: the objects drawn.
        ground: the name of the background colour; None if the image is grey.
        colored: True if questions may ask for colours.
    """
    out: list[Question] = []
    if ground is not None:
        out.append(Question(question_type="background", text=_word(rng, "background"), answer=ground))
    if scene_type == "group":
        out += _count(rng, things, colored)
    else:
        out += _each_thing(rng, things, colored)
        out += _relations(rng, things)
    out += _existence(rng, things, colored)
    caption = _caption(scene_type, things) if colored else None
    if caption:
        out.append(Question(question_type="caption", text=_word(rng, "caption"), answer=caption))
    return [out[i] for i in rng.permutation(len(out))]


def _unique_names(things: list[Thing], colored: bool) -> list[tuple[Thing, str]]:
    """Return each thing with a unique name, and its shortest unique name."""
    named = []
    for thing in things:
        if sum(t.shape == thing.shape for t in things) == 1:
            named.append((thing, thing.shape))
        elif colored:
            named.append((thing, f"{thing.color} {thing.shape}"))
    return named


def _each_thing(rng: np.random.Generator, things: list[Thing], colored: bool) -> list[Question]:
    out = []
    for thing, name in _unique_names(things, colored)[:2]:
        if len(things) == 1:
            out.append(Question(question_type="shape", text=_word(rng, "shape_single"), answer=thing.shape))
        elif colored and sum(t.color == thing.color for t in things) == 1:
            out.append(Question(question_type="shape", text=_word(rng, "shape", thing.color), answer=thing.shape))
        if colored and name == thing.shape:
            out.append(Question(question_type="color", text=_word(rng, "color", thing.shape), answer=thing.color))
        if thing.radius >= 11:
            out.append(Question(question_type="pattern", text=_word(rng, "pattern", name), answer=thing.pattern))
        if thing.radius < 16:
            out.append(Question(question_type="size", text=_word(rng, "size", name), answer=thing.size))
            place = region(thing.x, thing.y)
            if place:
                out.append(Question(question_type="position", text=_word(rng, "position", name), answer=place))
    return out


def _count(rng: np.random.Generator, things: list[Thing], colored: bool) -> list[Question]:
    out = []
    shapes = sorted({t.shape for t in things})
    for shape in shapes:
        number = sum(t.shape == shape for t in things)
        out.append(Question(question_type="count", text=_word(rng, "count", shape), answer=NUMBERS[number]))
    color = things[0].color
    if colored and len(shapes) == 2:
        number = sum(t.color == color for t in things)
        text = _word(rng, "count", f"{color} object")
        out.append(Question(question_type="count", text=text, answer=NUMBERS[number]))
    return [q for q in out if q.answer in NUMBERS]


def _relations(rng: np.random.Generator, things: list[Thing]) -> list[Question]:
    if len(things) < 2 or len({t.shape for t in things}) < len(things):
        return []
    a, b = (things[int(i)] for i in rng.permutation(len(things))[:2])
    dx, dy = a.x - b.x, a.y - b.y
    out = []
    if abs(dx) > 7 and abs(dx) > abs(dy):
        true, false = ("left of", "right of") if dx < 0 else ("right of", "left of")
    elif abs(dy) > 7 and abs(dy) > abs(dx):
        true, false = ("above", "below") if dy < 0 else ("below", "above")
    else:
        return []
    yes = rng.random() < 0.5
    text = f"Is the {a.shape} {true if yes else false} the {b.shape}?"
    out.append(Question(question_type="relation", text=text, answer="yes" if yes else "no"))
    if len(things) == 2:
        text = f"What is {true} the {b.shape}?"
        out.append(Question(question_type="relation", text=text, answer=a.shape))
    return out


def _existence(rng: np.random.Generator, things: list[Thing], colored: bool) -> list[Question]:
    thing = things[int(rng.integers(len(things)))]
    shapes = {t.shape for t in things}
    out = []
    absent = str(rng.choice([s for s in SHAPES if s not in shapes]))
    if rng.random() < 0.5:
        out.append(Question(question_type="exists", text=_word(rng, "exists", thing.shape), answer="yes"))
    else:
        out.append(Question(question_type="exists", text=_word(rng, "exists", absent), answer="no"))
    first, second = (thing.shape, absent) if rng.random() < 0.5 else (absent, thing.shape)
    text = f"Which is in the picture, a {first} or a {second}?"
    out.append(Question(question_type="choice", text=text, answer=thing.shape))
    if colored:
        pairs = {(t.shape, t.color) for t in things}
        yes = rng.random() < 0.5
        color = thing.color
        if not yes:
            color = str(rng.choice([c for c in COLORS if (thing.shape, c) not in pairs]))
        alone = len(shapes) == len(things)
        text = f"Is the {thing.shape} {color}?" if alone else f"Is there {_a(color)} {thing.shape}?"
        out.append(Question(question_type="check", text=text, answer="yes" if yes else "no"))
    return out


def _caption(scene_type: str, things: list[Thing]) -> str | None:
    if scene_type == "group":
        if len({(t.shape, t.color) for t in things}) > 1:
            return None
        n, first = len(things), things[0]
        return f"{NUMBERS[n]} {first.color} {first.shape}{'s' if n > 1 else ''}" if n < 7 else None
    if len(things) == 1:
        only = things[0]
        return f"a {only.pattern} {only.color} {only.shape}"
    if len(things) == 2 and abs(things[0].x - things[1].x) > 5:
        left, right = sorted(things, key=lambda t: t.x)
        return f"{_a(left.color)} {left.shape} and {_a(right.color)} {right.shape}"
    return None


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"

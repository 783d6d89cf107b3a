"""Drawing from a seed: masks of shapes, fills, noise. Images are uint8 arrays [SIDE, SIDE, 3].

Every function gets its random generator as an argument, so an image is a pure function of its seed.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 64  # pixels
_OVERSAMPLE = 3

# Colour name -> typical RGB; a drawn colour is jittered around it.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 35),
    "orange": (240, 140, 25),
    "yellow": (240, 220, 50),
    "green": (45, 160, 60),
    "blue": (40, 80, 210),
    "purple": (130, 50, 165),
    "pink": (245, 150, 190),
    "brown": (120, 72, 35),
    "black": (22, 22, 24),
    "white": (242, 242, 240),
    "gray": (130, 130, 132),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PATTERNS = ("plain", "striped", "dotted", "checked")


def random_for(*key: int | str) -> np.random.Generator:
    """Return the generator of ``key``; equal keys give equal images on every machine."""
    words: list[int] = []
    for part in key:
        words += [part] if isinstance(part, int) else [len(part), *part.encode()]
    return np.random.default_rng(words)


def jitter_color(rng: np.random.Generator, name: str, amount: float = 14.0) -> np.ndarray:
    """Return a float RGB [3] near the colour called ``name``."""
    return np.clip(np.array(COLORS[name], float) + rng.normal(0, amount, 3), 0, 255)


def polygon_points(shape: str, cx: float, cy: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """Return the corners of a straight-edged shape; ``angle`` is in radians."""
    if shape == "star":
        radii, turns = [radius, radius * 0.42] * 5, 10
    elif shape == "cross":
        # Twelve corners of a plus sign, as (x, y) in units of the radius.
        arm, w = 1.0, 0.34
        corners = [(-w, -arm), (w, -arm), (w, -w), (arm, -w), (arm, w), (w, w)]
        corners += [(-x, -y) for x, y in corners]
        c, s = math.cos(angle), math.sin(angle)
        return [(cx + radius * (x * c - y * s), cy + radius * (x * s + y * c)) for x, y in corners]
    else:
        turns = {"triangle": 3, "square": 4}[shape]
        radii = [radius * 1.15] * turns
        angle += math.pi / 4 if shape == "square" else 0.0
    points = []
    for i, r in enumerate(radii):
        a = angle - math.pi / 2 + 2 * math.pi * i / turns
        points.append((cx + r * math.cos(a), cy + r * math.sin(a)))
    return points


def shape_mask(shape: str, cx: float, cy: float, radius: float, angle: float = 0.0) -> np.ndarray:
    """Return an anti-aliased mask [SIDE, SIDE] in 0..1 of ``shape`` centred at (cx, cy), in pixels."""
    k = _OVERSAMPLE
    canvas = Image.new("L", (SIDE * k, SIDE * k), 0)
    draw = ImageDraw.Draw(canvas)
    cx, cy, radius = cx * k, cy * k, radius * k
    if shape in ("circle", "ring"):
        draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=255)
        if shape == "ring":
            r = radius * 0.55
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=0)
    else:
        draw.polygon(polygon_points(shape, cx, cy, radius, angle), fill=255)
    return shrink(canvas)


def ellipse_mask(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    """Return the mask [SIDE, SIDE] of a turned ellipse with soft one-pixel edge."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    c, s = math.cos(angle), math.sin(angle)
    u, v = (x - cx) * c + (y - cy) * s, -(x - cx) * s + (y - cy) * c
    distance = np.sqrt((u / rx) ** 2 + (v / ry) ** 2)
    return np.clip((1 - distance) * min(rx, ry) + 0.5, 0, 1)


def polygon_mask(points: list[tuple[float, float]]) -> np.ndarray:
    """Return the anti-aliased mask [SIDE, SIDE] of a polygon given in pixels."""
    k = _OVERSAMPLE
    canvas = Image.new("L", (SIDE * k, SIDE * k), 0)
    ImageDraw.Draw(canvas).polygon([(x * k, y * k) for x, y in points], fill=255)
    return shrink(canvas)


def shrink(canvas: Image.Image) -> np.ndarray:
    """Reduce an oversampled grey canvas to a mask [SIDE, SIDE] in 0..1."""
    return np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.float32) / 255


def fill_pattern(
    rng: np.random.Generator,
    pattern: str,
    ink: np.ndarray,
    ground: np.ndarray,
    *,
    period: float | None = None,
) -> np.ndarray:
    """Return a float image [SIDE, SIDE, 3] of ``ink`` patterned with ``ground``; period in pixels."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    period = period or rng.uniform(5, 8)
    px, py = rng.uniform(0, period, 2)
    if pattern == "plain":
        on = np.ones((SIDE, SIDE), np.float32)
    elif pattern == "striped":
        a = rng.choice([0.0, math.pi / 2, math.pi / 4])
        on = (((x * math.cos(a) + y * math.sin(a) + px) % period) < period * 0.55).astype(np.float32)
    elif pattern == "dotted":
        u, v = (x + px) % period - period / 2, (y + py) % period - period / 2
        on = 1 - (u**2 + v**2 < (period * 0.3) ** 2).astype(np.float32)
    else:
        on = ((((x + px) // (period / 2)) + ((y + py) // (period / 2))) % 2).astype(np.float32)
    return on[..., None] * ink + (1 - on[..., None]) * ground


def paint(image: np.ndarray, mask: np.ndarray, fill: np.ndarray) -> None:
    """Blend ``fill`` ([3] or [SIDE, SIDE, 3]) into ``image`` in place, weighted by ``mask``."""
    image += mask[..., None] * (fill - image)


def smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Return smooth noise [SIDE, SIDE], mean about 0 and deviation about 1, with ``cells`` cells a side."""
    coarse = Image.fromarray(rng.normal(0, 1, (cells + 2, cells + 2)).astype(np.float32))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def finish(rng: np.random.Generator, image: np.ndarray, *, noise: float, blur: float = 0.0) -> np.ndarray:
    """Blur (radius in pixels), add sensor noise (deviation in grey levels), and round to uint8."""
    if blur > 0:
        sharp = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        image = np.asarray(sharp.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32)
    noisy = image + rng.normal(0, noise, image.shape)
    return np.clip(noisy + 0.5, 0, 255).astype(np.uint8)

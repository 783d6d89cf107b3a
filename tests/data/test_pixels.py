"""Arrays of numpy and torch as images: what is plain is taken, what could be read two ways is refused."""

import numpy as np
import pytest
import torch

from finetune.data.images import as_source
from finetune.data.pixels import pixels_of
from finetune.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
FIRST = PIXELS.transpose(2, 0, 1)  # [3, H, W]
WAYS = {
    "numpy uint8": PIXELS,
    "numpy uint8, channels first": FIRST,
    "numpy float32": PIXELS.astype(np.float32) / 255,
    "numpy float64": PIXELS / 255,
    "numpy float32, channels first": FIRST.astype(np.float32) / 255,
    "torch uint8": torch.from_numpy(PIXELS),
    "torch uint8, channels first": torch.from_numpy(FIRST.copy()),
    "torch float32, channels first": torch.from_numpy(FIRST / 255).float(),
    "torch float32": torch.from_numpy(PIXELS / 255).float(),
    "torch with a gradient": torch.from_numpy(FIRST / 255).requires_grad_(),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_same_image(way):
    found = as_source(WAYS[way])
    assert found.dtype == np.uint8 and found.flags.c_contiguous and np.array_equal(found, PIXELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_it_can_be(dtype):
    found = pixels_of(torch.from_numpy(FIRST / 255).to(dtype))
    assert np.abs(found.astype(int) - PIXELS.astype(int)).max() <= 1  # 1/255 is its last place near 1


def test_black_and_white_are_the_ends():
    assert (pixels_of(np.ones((2, 4, 3))) == 255).all() and (pixels_of(np.zeros((2, 4, 3))) == 0).all()


BROKEN = {
    "both ways": (np.zeros((3, 5, 3), np.uint8), r"got an array \[3, 5, 3\] of uint8, which fits both \[H, W, 3\] and"),
    "a batch": (torch.zeros(1, 3, 4, 5), r"shape \[H, W, 3\] or \[3, H, W\], got an array \[1, 3, 4, 5\] of float32"),
    "grey": (np.zeros((4, 5), np.uint8), r"an RGB image must have the shape .*, got an array \[4, 5\] of uint8"),
    "four channels": (np.zeros((4, 5, 4), np.uint8), "an RGB image must have the shape"),
    "three in the middle": (np.zeros((4, 3, 5), np.uint8), "an RGB image must have the shape"),
    "nothing": (np.zeros((0, 5, 3), np.uint8), "an RGB image must have the shape"),
    "0 to 255": (
        np.full((4, 5, 3), 200.0),
        r"floating-point pixels must be from 0 to 1, got .* values from 200 to 200.*255",
    ),
    "normalised": (
        torch.linspace(-2, 2, 60).view(3, 4, 5),
        "values from -2 to 2. .* before a processor",
    ),
    "not a number": (np.full((4, 5, 3), np.nan), "with values from nan to nan"),
    "one not a number": (np.where(np.arange(60).reshape(4, 5, 3) == 7, np.nan, 0.5), "with values from nan to nan"),
    "infinite": (torch.full((3, 4, 5), torch.inf), "with values from inf to inf"),
    "whole numbers": (np.zeros((4, 5, 3), np.int64), "pixels must be uint8, or floating-point .* of int64"),
    "truth values": (torch.zeros(3, 4, 5, dtype=torch.bool), "pixels must be uint8, .* of bool"),
    "16 bit": (np.zeros((4, 5, 3), np.uint16), "pixels must be uint8, .* of uint16"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_image_is_refused(what):
    array, message = BROKEN[what]
    with pytest.raises(DataError, match=message):
        as_source(array)

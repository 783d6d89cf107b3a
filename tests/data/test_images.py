"""Images of every kind are read with the right pixels; what cannot be read is found, and only looked at once."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from finetune.data import image_checks
from finetune.data.image_checks import image_sizes
from finetune.data.images import as_source, image_digest, open_image
from finetune.errors import DataError, RowError

CAP = 50_000_000


def pixels(image):
    return np.asarray(image).reshape(-1, 3).tolist()


def saved(folder, image, name="x.png", **options):
    image.save(folder / name, **options)
    return folder / name


def palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.info["transparency"] = 0
    return image


def rgb_with_transparency(folder):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 8, 7))
    return saved(folder, image, transparency=(1, 2, 3))


def sixteen_bit(mode):
    values = np.array([[0, 257 * 100, 257 * 254]], np.uint16)
    return Image.fromarray(values if mode == "I;16" else values.astype(np.int32))


def animation(folder, name):
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "lime", "blue")]
    return saved(
        folder,
        frames[0],
        name,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if "webp" in name else {}),
    )


# name -> (a function of a folder that writes the image, the pixels it must have from left to right, top to bottom)
KINDS = {
    "grey": (lambda f: saved(f, Image.fromarray(np.array([[0, 7, 255]], np.uint8))), [[0] * 3, [7] * 3, [255] * 3]),
    "black and white": (lambda f: saved(f, Image.fromarray(np.array([[True, False]]))), [[255] * 3, [0] * 3]),
    "RGBA is seen on white": (
        lambda f: saved(f, Image.fromarray(np.array([[[200, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 51]]], np.uint8))),
        [[200, 0, 0], [255, 255, 255], [204, 204, 204]],
    ),
    "grey with alpha": (
        lambda f: saved(f, Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA")),
        [[9, 9, 9], [255, 255, 255]],
    ),
    "palette": (lambda f: saved(f, Image.fromarray(np.array([[[9, 99, 199]]], np.uint8)).quantize(2)), [[9, 99, 199]]),
    "palette with transparency": (
        lambda f: saved(f, palette_with_transparency(), transparency=0),
        [[255, 255, 255], [200, 100, 50]],
    ),
    "RGB with a transparent colour": (rgb_with_transparency, [[255, 255, 255], [9, 8, 7]]),
    "CMYK": (
        lambda f: saved(f, Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "x.tiff"),
        [[255, 0, 0]],
    ),
    "16 bit": (lambda f: saved(f, sixteen_bit("I;16")), [[0] * 3, [100] * 3, [254] * 3]),
    "16 bit in 32": (lambda f: saved(f, sixteen_bit("I"), "x.tiff"), [[0] * 3, [100] * 3, [254] * 3]),
    "animated GIF": (lambda f: animation(f, "x.gif"), [[255, 0, 0]] * 4),
    "animated PNG": (lambda f: animation(f, "x.png"), [[255, 0, 0]] * 4),
    "animated WebP": (lambda f: animation(f, "x.webp"), [[255, 0, 0]] * 4),
    "one pixel": (lambda f: saved(f, Image.new("RGB", (1, 1), (1, 2, 3))), [[1, 2, 3]]),
    "one grey pixel in a BMP": (lambda f: saved(f, Image.new("L", (1, 1), 77), "x.bmp"), [[77] * 3]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_with_its_pixels(tmp_path, kind):
    make, expected = KINDS[kind]
    path = make(tmp_path)
    for source in (path, path.read_bytes()):
        image = open_image(source)
        assert image.mode == "RGB" and pixels(image) == expected
    assert image_sizes([path], max_pixels=CAP) == [image.size]


def test_a_cmyk_jpeg_has_its_colours(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (16, 16), (220, 30, 60)).convert("CMYK"), "x.jpg", quality=95)
    assert np.abs(np.asarray(open_image(path)).astype(int) - [220, 30, 60]).max() <= 4


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (1, 0)), (3, (1, 2)), (4, (0, 2)), (5, (0, 0)), (6, (2, 0)), (7, (2, 1)), (8, (0, 1))],
)
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_every_orientation_is_undone(tmp_path, orientation, corner, mode):
    """One white pixel in the upper left corner of an image of 2 x 3; ``corner`` is where it must come out."""
    grey = np.zeros((3, 2), np.uint16)
    grey[0, 0] = 65535
    image = Image.fromarray(grey) if mode == "I;16" else Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, image, exif=exif)
    out = open_image(path)
    assert out.size == ((3, 2) if orientation > 4 else (2, 3))
    assert out.getpixel(corner) == (255, 255, 255) and int(np.asarray(out).sum()) == 3 * 255
    assert image_sizes([path], max_pixels=CAP) == [out.size], "the length of a row is told by the upright size"


def png_claiming(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_large_image_is_refused_before_it_is_decoded(tmp_path):
    for side, message in (
        (8000, "at most 50000000 pixels, got 8000 x 8000"),
        (60000, "at most twice PIL's own cap of"),
    ):
        with pytest.raises(RowError, match=message) as caught:
            open_image(png_claiming(side, side))
        assert caught.value.reason == "image over the pixel cap"
    path = saved(tmp_path, Image.new("RGB", (50, 40)))
    assert image_sizes([path], max_pixels=CAP) == [(50, 40)]
    (error,) = image_sizes([path], max_pixels=100)  # known by now
    assert "x.png: an image must have at most 100 pixels, got 50 x 40" in str(error)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.webp", "x.bmp", "x.tiff"])
def test_an_image_whose_end_is_missing_is_found(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), name)
    assert image_sizes([path], max_pixels=CAP) == [(50, 60)]
    path.write_bytes(path.read_bytes()[:-200])
    (error,) = image_sizes([path], max_pixels=CAP)
    assert isinstance(error, RowError) and f"{name}: not a readable image" in str(error)
    with pytest.raises(RowError, match="not a readable image"):
        open_image(path)


def test_an_image_is_looked_at_once_until_it_changes(tmp_path, monkeypatch, rested):
    looked = []
    real = image_checks.look
    monkeypatch.setattr(image_checks, "look", lambda source, **k: looked.append(source) or real(source, **k))
    a, b = saved(tmp_path, Image.new("RGB", (3, 2)), "a.png"), saved(tmp_path, Image.new("RGB", (5, 4)), "b.png")
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    for _ in range(2):
        sizes = image_sizes([a, b, a, bad], max_pixels=CAP)
        assert sizes[:3] == [(3, 2), (5, 4), (3, 2)] and "bad.png: not a readable" in str(sizes[3])
    assert sorted(str(path.name) for path in looked) == ["a.png", "b.png", "bad.png", "bad.png"], "good ones once"
    saved(tmp_path, Image.new("RGB", (7, 7)), "a.png")
    os.utime(a, ns=(1, 1))
    assert image_sizes([a], max_pixels=CAP) == [(7, 7)]


def test_a_cache_that_fails_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    path = saved(tmp_path, Image.new("RGB", (3, 2)))
    assert image_sizes([path, path], max_pixels=CAP) == [(3, 2), (3, 2)]


def test_only_images_are_opened(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")  # PIL would start Ghostscript
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tiff")
    for name, message in (("x.eps", "not a readable"), ("x.tiff", "floating-point"), ("no.png", "no such file")):
        with pytest.raises(RowError, match=f"{name}: .*{message}"):
            open_image(tmp_path / name)
    with pytest.raises(RowError, match="not a readable"):
        open_image(tmp_path)


def test_images_from_an_app(tmp_path):
    Image.new("RGB", (3, 3), "red").save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert open_image(as_source(source)).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(as_source(Image.new("L", (3, 3), 7))).getpixel((0, 0)) == (7, 7, 7)
    deep = Image.fromarray(np.full((3, 3), 257 * 100, np.uint16))
    assert open_image(as_source(deep)).getpixel((0, 0)) == (100, 100, 100)
    assert open_image(as_source(Image.new("RGBA", (1, 1), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(DataError, match="an image must be a path, bytes, .* got builtins.int"):
        as_source(3)


def test_a_pil_image_of_a_broken_file(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    with Image.open(tmp_path / "a.png") as image, pytest.raises(DataError, match="the PIL image cannot be read: "):
        as_source(image)
    with pytest.raises(
        DataError, match="the PIL image cannot be read: pixels must be whole numbers, got floating-point numbers"
    ):
        as_source(Image.new("F", (3, 3)))


def test_a_digest_is_of_content(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert image_digest(tmp_path / "a") == image_digest(b"x")
    assert image_digest(np.zeros((2, 3, 3), np.uint8)) != image_digest(np.zeros((3, 2, 3), np.uint8))
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    assert image_digest(buffer.getvalue()) == image_digest(buffer.getvalue())

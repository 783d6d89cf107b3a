"""Invalid requests for hypothesis: some of the right form with any content, others of no form."""

import base64
import io
import json

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from finetune.server.schema import ChatRequest
from tests.server.serving import data_url, image_part, png


def noise(width, height, kind="PNG", mode="RGB", **options):
    """Return the file of an image."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def many_scans(side, count, *, quality=75):
    """Return a JPEG of a square image whose last scan comes again and again; each takes the more, the larger it is."""
    file = io.BytesIO()
    Image.radial_gradient("L").resize((side, side)).convert("RGB").save(file, "JPEG", progressive=True, quality=quality)
    data = file.getvalue()
    begin, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:begin] + data[begin:end] * (count - data.count(b"\xff\xda") + 1) + data[end:]


SIZES = [(1, 1), (1, 300), (300, 1), (6000, 20), (20, 6000), (2, 3), (70, 40)]
FILES = [
    *(noise(*size) for size in SIZES),
    *(noise(40, 30, kind) for kind in ("JPEG", "GIF", "WEBP")),
    *(noise(40, 30, "PNG", mode) for mode in ("L", "1", "RGBA", "LA", "P", "I;16")),
    noise(40, 30)[:-20],
    noise(40, 30, "JPEG")[:-200],
    noise(40, 30)[:40],
    b"\x89PNG\r\n\x1a\n",
    b"",
]
_BARE = base64.b64encode(png()).decode()
URLS = [
    *map(data_url, FILES), _BARE, f"data:image/png,{_BARE}", f"data:image/png;base64,{_BARE}=", "data:",
    "data:;base64,",
    "data:image/png;base64,\x00", "data:image/svg+xml;base64,PHN2Zz4=", "/etc/passwd", "file:///etc/passwd",
    "image.jpg",
    "http://127.0.0.1/a.png", "http://\x00", "http://[", "https://" + "a" * 5000, "DATA:image/png;base64," + _BARE,
    "data:image/png;charset=\ud800;base64," + _BARE, " ", "\ud800",
]  # fmt: skip
MARKS = [
    "<image>", "<video>", "<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|assistant|>", "<|user|>", "<|end|>",
    "<|im_end|>", "<|im_start|>assistant\n", "<end_of_utterance>", "<eos>", "<bos>", "<s>", "</s>", "<pad>", "<unk>",
    "<IMG_CONTEXT>", "<start_of_image>", "<image_soft_token>", "<loc0001>", "{question}", "{{ messages }}", "{% raw %}",
]  # fmt: skip
ODD = [
    "",
    " ",
    "\n",
    "\x00",
    "a\x00b",
    "\ud800",
    "\udfff\ud800",
    "\u2028",
    "\ufeff",
    "e\u0301",
    "\U0001f600",
    "a" * 3000,
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 2**63, -(2**63) - 1, 10**400, 1e308, float("inf"), float("nan"), -0.0]),
    st.sampled_from(ODD),
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def nested(levels):
    """Return a list in a list, and so on."""
    value = []
    for _ in range(levels):
        value = [value]
    return value


def requests(marks=()):
    """Return a strategy of bodies as bytes.

    Args:
        marks: texts with a meaning for the base, beside those that are known of any.
    """
    texts = st.one_of(
        st.sampled_from(["a", "What is this?"]),
        st.sampled_from(ODD),
        st.text(max_size=20),
        st.tuples(st.sampled_from([*MARKS, *marks]), st.text(max_size=3)).map("".join),
    )
    images = st.sampled_from(URLS).map(lambda url: {"type": "image_url", "image_url": {"url": url}})
    parts = st.one_of(
        st.builds(lambda text: {"type": "text", "text": text}, texts),
        images,
        st.just(image_part(png())),
        st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "image_url", "image", "video_url", "input_audio", ""])}
        ),
        ANYTHING,
    )
    good = st.lists(st.one_of(images, st.builds(lambda text: {"type": "text", "text": text}, texts)), max_size=3)
    contents = st.one_of(texts, good, good, st.lists(parts, max_size=3), ANYTHING)
    roles = st.sampled_from(["user", "user", "system", "assistant", "developer", "tool", "", None, 3])
    message = st.builds(lambda role, content: {"role": role, "content": content}, roles, contents)
    messages = st.one_of(
        st.builds(lambda content: [{"role": "user", "content": content}], contents),
        st.builds(lambda content: [{"role": "user", "content": content}], good),
        st.lists(message, max_size=4),
        ANYTHING,
        st.sampled_from([[{"role": "user", "content": "a"}] * 10_000, nested(90), nested(5000)]),
    )
    models = st.one_of(st.just("base"), st.just("base"), st.sampled_from([*ODD, "a/b@1", "../x", "a/b@" + "9" * 200]))
    fields = st.dictionaries(
        st.sampled_from([*sorted(ChatRequest.model_fields), "extra", "\ud800", ""]), texts | ANYTHING, max_size=2
    )
    bodies = st.builds(
        lambda model, messages, more: {"max_tokens": 2, "model": model, "messages": messages} | more,
        models,
        messages,
        st.just({}) | st.just({"stream": True}) | fields,
    )
    return (bodies | bodies | bodies | ANYTHING).map(as_bytes)


def as_bytes(body):
    """Return JSON, and what is too deep for Python's writer of it as brackets."""
    try:
        return json.dumps(body).encode()
    except RecursionError:
        return b'{"model": "base", "messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"

"""What an app gives: images in every form, by URL where that is allowed, and captions as they were supervised."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.assemble.loading import load_base
from finetune.errors import DataError, FetchError, ModelError, RowError
from finetune.recipe.task import DEFAULT_ANSWER_TOKENS
from finetune.runs.train import train
from finetune.serving.loading import load
from finetune.serving.urls import UrlPolicy
from finetune.serving.vision_language_model import CAPTION_QUESTION, CAPTION_TOKENS, VisionLanguageModel
from tests.serving.adapters import make_adapter
from tests.serving.test_urls import HERE, responding, serving

QUESTION = "What color is it?"


@pytest.fixture(scope="module")
def vlm(tiny_fast_vlm):
    return VisionLanguageModel(load_base(str(tiny_fast_vlm), device="cpu"))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The file of an image that is not the same whichever way it lies."""
    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(path)
    return path


def asked(vlm, monkeypatch):
    """The images and prompts that the model is given from now on."""
    seen = []
    prompt_batch = vlm.base.collator.prompt_batch

    def keep(examples):
        batch = prompt_batch(examples)
        seen.append((vlm.processor.tokenizer.decode(batch.inputs["input_ids"][0]), batch.inputs.get("pixel_values")))
        return batch

    monkeypatch.setattr(vlm.base.collator, "prompt_batch", keep, raising=False)
    return seen


WAYS = {
    "path": lambda path: path,
    "text": str,
    "bytes": lambda path: path.read_bytes(),
    "PIL": Image.open,
    "numpy": lambda path: np.asarray(Image.open(path)),
    "numpy floats": lambda path: np.asarray(Image.open(path)) / 255,
    "torch": lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1),
    "torch floats": lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255,
    "data": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_the_same_however_it_comes(vlm, image, way, monkeypatch):
    monkeypatch.setattr(vlm, "urls", UrlPolicy())
    seen = asked(vlm, monkeypatch)
    wanted = vlm.ask(image, QUESTION)
    assert vlm.ask(WAYS[way](image), QUESTION) == wanted
    assert torch.equal(seen[0][1], seen[1][1]) and seen[0][1].std() > 0


def test_a_url_where_that_is_allowed(tiny_fast_vlm, image):
    policy = UrlPolicy(allow_private=HERE)
    allowed = load("base", base=str(tiny_fast_vlm), device="cpu", allow_urls=policy)
    wanted = allowed.ask(image, QUESTION)
    with serving(responding(image.read_bytes())) as (host, requests):
        url = f"http://{host}/a.png"
        assert allowed.ask(url, QUESTION) == wanted and len(requests) == 1
        public = load("base", base=str(tiny_fast_vlm), device="cpu", allow_urls=True)
        with pytest.raises(FetchError, match=f"question: {url}: every address of the host must be public"):
            public.ask(url, QUESTION)
        bare = load("base", base=str(tiny_fast_vlm), device="cpu")
        for call in (bare.ask, bare.stream):
            with pytest.raises(FetchError, match="this model fetches no images from URLs. Allow it .*allow_urls=True"):
                call(url, QUESTION)
        message = {"role": "user", "content": [{"type": "image", "image": url}, {"type": "text", "text": "What?"}]}
        with pytest.raises(FetchError, match="fetches no images from URLs"):
            bare.chat([message])
        with pytest.raises(FetchError, match="question 1: .* fetches no images from URLs"):
            bare.ask_batch([image, url], [QUESTION, QUESTION])
        assert len(requests) == 1


def cut(image, tmp_path):
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:900])
    return tmp_path / "cut.png"


def huge(image, tmp_path):
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")
    return out.getvalue()


BROKEN = {
    "no file": (lambda image, tmp_path: tmp_path / "no.png", RowError, "no.png: no such file"),
    "a folder": (lambda image, tmp_path: tmp_path, RowError, "not a readable image: .*Is a directory"),
    "cut off": (cut, RowError, "cut.png: not a readable image: "),
    "no image": (lambda image, tmp_path: b"<html>", RowError, "its image: not a readable image"),
    "too large": (huge, RowError, "at most 50000000 pixels, got 9000 x 9000"),
    "another type": (lambda image, tmp_path: {"url": "x"}, DataError, "got builtins.dict"),
    "an open file": (lambda image, tmp_path: io.BytesIO(), DataError, "an image must be a path, bytes, .* got _io.Byt"),
    "normalised": (lambda image, tmp_path: torch.randn(3, 8, 9), DataError, "question: .* must be from 0 to 1"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_image_is_refused(vlm, image, what, tmp_path):
    make, error, message = BROKEN[what]
    with pytest.raises(error, match=message):
        vlm.ask(make(image, tmp_path), QUESTION)


def test_a_question_is_a_text(vlm, image):
    with pytest.raises(DataError, match="question 1: a question must be a str, got None"):
        vlm.ask_batch([image, image], [QUESTION, None])


@pytest.fixture
def captioned(make_recipe, rows_folder, tiny_fast_vlm):
    """A recipe that learns captions, of which some rows ask otherwise."""
    for split in ("train", "val", "test"):
        file = rows_folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["captions"] = [f"a {row.pop('answer')} square", "a square"]
            del row["question"]
            if number % 3 == 0:
                row["question"] = "Say it otherwise."
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"system_prompt": "Look.", "question_template": "Q: {question}", "max_new_tokens": 5}
    return make_recipe(tiny_fast_vlm, data={"default_question": "What is drawn?"}, task=task, name="captions")


def test_an_adapter_trained_on_captions_is_asked_as_it_was_trained(captioned, tiny_fast_vlm, image, monkeypatch):
    run = train(captioned)
    vlm = load(run.ref, base=str(tiny_fast_vlm), device="cpu")
    assert vlm.adapter.manifest.task.caption_question == "What is drawn?"
    seen, limits = asked(vlm, monkeypatch), limits_of(vlm, monkeypatch)
    assert vlm.caption(image) == vlm.ask(image, "What is drawn?")
    (first, pixels), (second, _) = seen
    assert first == second and "Look." in first and "Q: What is drawn?" in first and pixels is not None
    assert limits == [5, 5]


def limits_of(vlm, monkeypatch):
    """The numbers of tokens that answers may have from now on."""
    limits = []
    generate = vlm.model.generate

    def keep(**options):
        limits.append(options["max_new_tokens"])
        return generate(**options)

    monkeypatch.setattr(vlm.model, "generate", keep, raising=False)
    return limits


def test_an_adapter_trained_without_an_image_takes_one(vlm, image, tmp_path, monkeypatch):
    adapter = make_adapter(vlm.base, "lora", tmp_path / "adapter")
    seen, limits = asked(vlm, monkeypatch), limits_of(vlm, monkeypatch)
    plain = vlm.caption(image)
    with vlm.using(adapter):
        assert vlm.adapter.manifest.task.caption_question is None
        assert vlm.caption(image) != plain
    vlm.remove(adapter)
    assert all(CAPTION_QUESTION in text for text, _ in seen) and limits == [DEFAULT_ANSWER_TOKENS, CAPTION_TOKENS]


def test_a_dual_encoder_captions_nothing(tiny_clip, image):
    clip = VisionLanguageModel(load_base(str(tiny_clip), device="cpu"))
    with pytest.raises(
        ModelError, match=r"caption\(image\) does not support task contrastive on a clip base. Use classify"
    ):
        clip.caption(image)


@pytest.mark.parametrize("given", [{"images": "a.png"}, {"questions": QUESTION}, {"adapters": "testing/a"}])
def test_one_text_is_no_list_of_them(vlm, given):
    lists = {"images": [None] * 2, "questions": [QUESTION] * 2, **given}
    with pytest.raises(DataError, match=f"`{next(iter(given))}` must be a list, got '"):
        vlm.ask_batch(**lists)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"allow_urls": "yes"}, DataError, "allow_urls must be True, False or a UrlPolicy, got 'yes'"),
        ({"verify_base": "ful"}, ModelError, "verify_base must be 'cached' or 'full', got 'ful'"),
    ],
)
def test_an_option_that_is_none_is_refused_at_once(tiny_fast_vlm, wrong, error, message):
    with pytest.raises(error, match=message):
        load("base", base=str(tiny_fast_vlm), device="cpu", **wrong)


def test_what_is_longer_than_the_base_takes_is_refused(vlm, image):
    long = "color " * 400
    message = r"the base takes 256 tokens; the row has 4\d\d in its text and images, and up to 1 in its answer"
    with pytest.raises(DataError, match=f"question: {message}"):
        vlm.ask(image, long)
    with pytest.raises(DataError, match=f"question 1: {message}"):
        vlm.ask_batch([image, image], [QUESTION, long])
    with pytest.raises(DataError, match=message):
        "".join(vlm.stream(image, long))
    assert vlm.ask(image, QUESTION) == vlm.ask_batch([image], [QUESTION])[0]


def test_an_image_for_a_base_that_takes_none_is_refused(vlm, image, monkeypatch):
    monkeypatch.setattr(type(vlm.base.family), "media", frozenset())
    refused = "{}: fast_vlm takes no media, and medium 1 of the row is of the type image. Leave such rows out"
    with pytest.raises(RowError, match=refused.format("row question")):
        vlm.ask(image, QUESTION)
    with pytest.raises(RowError, match=refused.format("row question 1")):
        vlm.ask_batch([None, image], [QUESTION, QUESTION])
    turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}
    with pytest.raises(RowError, match=refused.format("row chat")):
        vlm.chat([turn])
    assert isinstance(vlm.ask(None, QUESTION), str)

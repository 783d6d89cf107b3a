"""What happens when something is pressed; Gradio and the browser are left out here."""

import numpy as np
import pytest
from PIL import Image

from finetune.assemble.loading import load_base
from finetune.errors import StoreError
from finetune.playground.examples import draw_examples, right_answer
from finetune.playground.playground import Playground
from finetune.registry import AdapterRegistry
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.playground.conftest import altered

QUESTION = "What color is it?"


@pytest.fixture
def playground(vlm, registry, tmp_path):
    return Playground(vlm, base="tiny", registry=registry, refs=[], examples=[])


@pytest.fixture
def image(tmp_path):
    Image.fromarray(np.full((40, 32, 3), (200, 30, 30), np.uint8)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_answers_come_one_by_one(playground, image):
    steps = list(playground.ask(image, QUESTION, ["testing/first", "testing/second"]))
    assert [step.count("answering …") for step in steps] == [3, 2, 1, 0]
    assert [step.count("answered in") for step in steps] == [0, 1, 2, 3]
    assert steps[-1].index("testing/first") < steps[-1].index("testing/second")


@pytest.mark.parametrize(
    ("given", "question", "chosen", "message"),
    [
        (None, QUESTION, [], "There is no image yet"),
        ("red.png", "  ", [], "The question is empty"),
        ("red.png", None, [], "The question is empty"),
        ("broken.png", QUESTION, [], "broken.png: not a readable image"),
        ("gone.png", QUESTION, [], "gone.png: no such file"),
        ("red.png", QUESTION, ["testing/foreign@9"], "testing/foreign@9 is not in the catalog any more"),
        ("red.png", QUESTION, ["/tmp"], "/tmp is not in the catalog any more"),
    ],
)
def test_what_is_wrong_is_one_message(playground, image, given, question, chosen, message):
    (image.parent / "broken.png").write_bytes(image.read_bytes()[:40])
    (shown,) = playground.ask(given and image.parent / given, question, chosen)
    assert "role='alert'" in shown and message in shown
    assert str(image.parent) not in shown, "a message names no folder of this machine"


def test_only_what_fits_can_be_chosen(playground):
    assert playground.choices == ["testing/first", "testing/second"]
    assert "trained on another base: someone/other-base" in playground.table()


def test_the_registry_is_looked_at_again(playground, registry, made, image, tmp_path):
    registry.publish(altered(made[1]["first"], tmp_path / "again", name="first", license="MIT"))
    registry.publish(altered(made[1]["first"], tmp_path / "third", name="third"))
    assert "testing/third" in playground.look_again()
    assert playground.choices == ["testing/first", "testing/second", "testing/third"]
    *_, shown = playground.ask(image, QUESTION, ["testing/first"])
    assert "version 2" in shown, "a name means the version that the table shows"


def test_a_registry_that_fails_leaves_what_was_there(playground, monkeypatch):
    def fail(self, **_):
        raise StoreError("the bucket is away")

    before = playground.entries
    monkeypatch.setattr(AdapterRegistry, "list", fail)
    shown = playground.look_again()
    assert "the bucket is away" in shown and "role='alert'" in shown and "testing/second" in shown
    assert playground.entries is before


def test_the_program_that_drew_an_image_knows_what_is_right(tmp_path):
    examples = draw_examples(tmp_path)
    assert {example.domain for example in examples} == {"medical", "retail"}
    for example in examples:
        wanted = example.answers[example.question]
        assert right_answer(examples, example.path, f" {example.question.upper()}") == wanted
    first = examples[0]
    assert right_answer(examples, first.path, "Is it art?") is None
    (tmp_path / "other.png").write_bytes(b"another file")
    assert right_answer(examples, tmp_path / "other.png", first.question) is None


def test_a_dual_encoder_is_given_labels(tiny_clip, registry, image):
    vlm = VisionLanguageModel(load_base(str(tiny_clip), device="cpu"), registry=registry)
    page = Playground(vlm, base="clip", registry=registry, refs=[], examples=[])
    *_, shown = page.ask(image, "red\nblue", [])
    assert "Which fits best: red, blue" in shown and "answered in" in shown
    (shown,) = page.ask(image, "red", [])
    assert "at least two labels" in shown

"""The same question to base and adapters, each as it was trained; a failure shows its reason and stops no other."""

import numpy as np
import pytest
from PIL import Image

from finetune.assemble.loading import load_base
from finetune.errors import DataError
from finetune.playground.answers import MAX_QUESTION, answer_side_by_side, read_image, read_words
from finetune.playground.catalog import read_catalog
from finetune.registry import AdapterRegistry
from finetune.serving.vision_language_model import VisionLanguageModel

IMAGE = np.full((40, 32, 3), (200, 30, 30), np.uint8)
QUESTION = "What color is it?"


def entries_of(vlm, *names):
    found = {entry.name: entry for entry in read_catalog(vlm.switcher.registry, [], vlm.base.identity)}
    return [found[name] for name in names]


def test_each_answers_as_it_does_alone(vlm):
    chosen = entries_of(vlm, "testing/first", "testing/second")
    answers = list(answer_side_by_side(vlm, IMAGE, QUESTION, chosen))
    assert [answer.entry for answer in answers] == [None, *chosen]
    alone = []
    for ref in (None, "testing/first", "testing/second"):
        with vlm.using(ref):
            alone.append(vlm.ask(IMAGE, QUESTION))
    assert [answer.text for answer in answers] == alone
    assert len(set(alone)) == 3, "the adapters say something else than the base"
    assert vlm.adapter is None, "what answers elsewhere has not changed"


def test_the_times_distinguish_loading_from_switching(vlm):
    chosen = entries_of(vlm, "testing/first")
    base, first = answer_side_by_side(vlm, IMAGE, QUESTION, chosen)
    _, again = answer_side_by_side(vlm, IMAGE, QUESTION, chosen)
    assert (base.was_loaded, first.was_loaded, again.was_loaded) == (False, True, False)
    assert 0 < again.ready_ms < first.ready_ms
    assert min(base.answer_ms, first.answer_ms, again.answer_ms) > 0


def test_a_damaged_one_shows_an_error_and_the_others_answer(vlm, registry):
    chosen = entries_of(vlm, "testing/first", "testing/second")
    manifest, _ = registry.read("testing/first")
    digest = manifest.files["adapter_model.safetensors"].sha256
    (blob,) = [path for path in registry.store.root.rglob(digest) if path.is_file()]
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    base, first, second = answer_side_by_side(vlm, IMAGE, QUESTION, chosen)
    assert "but must be" in first.error and first.text == ""
    assert base.error is None and second.error is None and second.text


def test_what_is_refused_is_not_even_read(vlm, monkeypatch):
    chosen = entries_of(vlm, "testing/foreign")
    monkeypatch.setattr(AdapterRegistry, "read", lambda *args: pytest.fail("it was read"))
    _, foreign = answer_side_by_side(vlm, IMAGE, QUESTION, chosen)
    assert foreign.error.startswith("trained on another base")


def test_a_dual_encoder_chooses_among_labels(tiny_clip):
    vlm = VisionLanguageModel(load_base(str(tiny_clip), device="cpu"))
    (answer,) = answer_side_by_side(vlm, IMAGE, ["red", "blue"], [])
    assert answer.text == vlm.classify(IMAGE, ["red", "blue"])


def test_an_image_is_read_upright_from_its_file(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "scan.png")
    assert np.array_equal(read_image(tmp_path / "scan.png"), IMAGE)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^broken\.png: not a readable image"):
        read_image(tmp_path / "broken.png")
    with pytest.raises(DataError, match="There is no image yet. Choose a file"):
        read_image(None)


def test_a_question_is_asked_as_it_stands():
    assert read_words("  Is it red, or blue? \n", labels=False) == "Is it red, or blue?"
    with pytest.raises(DataError, match="The question is empty. Write a question"):
        read_words(" \n", labels=False)
    with pytest.raises(DataError, match=f"at most {MAX_QUESTION} characters, got {MAX_QUESTION + 1}"):
        read_words("x" * (MAX_QUESTION + 1), labels=False)


def test_labels_stand_on_lines_or_between_commas():
    assert read_words("a shirt, a hat\n a sock,,\na hat", labels=True) == ["a shirt", "a hat", "a sock"]
    with pytest.raises(DataError, match="at least two labels"):
        read_words("a shirt", labels=True)

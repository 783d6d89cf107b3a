"""The procedural worlds: pure functions of a seed, splits apart, questions in balance."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from finetune.pocket.domains import read_domain, read_world
from finetune.pocket.medical import draw_phantom
from finetune.pocket.questions import QUESTION_TYPES
from finetune.pocket.retail import draw_product
from finetune.pocket.world import draw_scene
from finetune.recipe import ProceduralData
from finetune.tasks.vqa import VqaConfig

DRAW = {"world": draw_scene, "medical": draw_phantom, "retail": draw_product}


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_an_image_is_a_function_of_its_seed(draw):
    one, again, other = draw(0, "train", 7), draw(0, "train", 7), draw(0, "test", 7)
    assert np.array_equal(one.image, again.image) and one.questions == again.questions
    assert not np.array_equal(one.image, other.image)
    assert one.image.shape == (64, 64, 3) and one.image.dtype == np.uint8


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_no_image_stands_in_two_splits(draw):
    seen = {split: {draw(0, split, i).image.tobytes() for i in range(60)} for split in ("train", "val", "test")}
    assert len(set.union(*seen.values())) == 180


def test_the_world_asks_every_question_type_and_no_answer_rules_a_yes_no_question():
    answers = defaultdict(Counter)
    for i in range(400):
        for question in draw_scene(0, "train", i).questions:
            answers[question.question_type][question.answer] += 1
    assert set(answers) == set(QUESTION_TYPES)
    for name in ("exists", "check"):
        share = answers[name]["yes"] / sum(answers[name].values())
        assert 0.4 < share < 0.6, name


def test_the_scene_gives_its_dense_labels():
    scene = draw_scene(0, "train", 3)
    assert scene.cells.shape == (8, 8, 3) and scene.mask.shape == (64, 64)
    covered = scene.mask.reshape(8, 8, 8, 8).sum(axis=(1, 3)) >= 32
    assert (scene.cells[..., 0][covered] > 0).all()


@pytest.mark.parametrize("name", ["medical", "retail"])
def test_domain_rows(name):
    section = ProceduralData(source="procedural", name=name, rows={"train": 40, "test": 120})
    rows = read_domain(section, "test", task=VqaConfig(), seed=0, bad=None)
    assert len(rows) == 120 and len({row.id for row in rows}) == 120
    found = {row.question_type for row in rows}
    assert found == (
        {"lesion", "margin", "size", "side", "cells"} if name == "medical" else {"garment", "color", "pattern", "tag"}
    )
    assert read_domain(section, "val", task=VqaConfig(), seed=0, bad=None) == []


def test_world_rows_are_as_many_of_each_question_type():
    rows = read_world(0, "test", rows_per_type=3, task=VqaConfig())
    assert Counter(row.question_type for row in rows) == dict.fromkeys(QUESTION_TYPES, 3)

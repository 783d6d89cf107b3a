"""The linear probe of whole runs, and its vectors on tiny models of every family."""

import json
import sqlite3
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from finetune.adapters.manifest import AdapterManifest
from finetune.assemble.loading import base_of
from finetune.assemble.rows import examples_of
from finetune.metrics.names import named_values
from finetune.runs.image_vectors import ImageVectors
from finetune.runs.train import train

LANGUAGE = {"towers": {"language": "all-linear"}}


@pytest.fixture
def closed_rows(rows_folder):
    """The rows of red and blue squares with two answers, each row twice as one image may have several rows."""
    for path in rows_folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"answer": "red" if "red" in row["answer"] else "blue"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]))
    return rows_folder


def vectors_of(recipe, *, batch_size=16):
    base = base_of(recipe, device="cpu")
    rows = examples_of(recipe, "train", base=base)
    return ImageVectors(base, base.collator_of(recipe.task), batch_size=batch_size), rows


def get(vectors, rows):
    assert vectors.fill(rows, Accelerator(cpu=True)) is None
    return vectors(rows)


def forget(tmp_path):
    (tmp_path / "cache" / "image_vectors.sqlite").unlink()


def check_vectors(recipe, tmp_path):
    alone, rows = vectors_of(recipe, batch_size=1)
    found = get(alone, rows)
    assert found.dtype == np.float32 and len(found) == len(rows) == 36 and found.ndim == 2
    assert len(alone) == alone.num_new == 18, "each image is computed once"
    assert np.array_equal(found[:18], found[18:]) and np.isfinite(found).all()
    assert len(np.unique(found[:18], axis=0)) == 18, "each image has a vector of its own"
    again, _ = vectors_of(recipe)
    assert np.array_equal(get(again, rows), found) and again.num_new == 0
    forget(tmp_path)
    together, _ = vectors_of(recipe, batch_size=4)
    np.testing.assert_allclose(get(together, rows), found, rtol=1e-4, atol=1e-5)
    assert together.num_new == 18
    return together.base, found


def test_the_vectors_of_every_family(tiny_family, make_recipe, closed_rows, tmp_path):
    recipe = make_recipe(tiny_family, method=LANGUAGE)
    base, found = check_vectors(recipe, tmp_path)
    projector = base.model.get_submodule(base.towers["projector"][0])
    assert not projector._forward_pre_hooks, "the hook is removed"
    assert found.shape[1] in {shape for p in projector.parameters() for shape in (p.shape[-1], p.shape[-1] // 4)}


def test_the_vectors_of_a_dual_encoder(tiny_clip, make_recipe, closed_rows, tmp_path):
    base, found = check_vectors(make_recipe(tiny_clip, method=LANGUAGE, task={"name": "contrastive"}), tmp_path)
    assert found.shape[1] == base.model.visual_projection.in_features


def test_a_vector_is_the_mean_of_what_the_projector_gets(tiny_fast_vlm, make_recipe, closed_rows):
    vectors, rows = vectors_of(make_recipe(tiny_fast_vlm))
    base, seen = vectors.base, []
    with torch.inference_mode():
        handle = base.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        base.model(**vectors.collator.prompt_batch(rows[:1]).inputs)
        handle.remove()
    np.testing.assert_allclose(get(vectors, rows[:1])[0], seen[0][0].mean(dim=0).numpy(), rtol=1e-4, atol=1e-6)


def test_a_base_without_a_projector_gives_the_output_of_its_tower(tiny_fast_vlm, make_recipe, closed_rows):
    vectors, rows = vectors_of(make_recipe(tiny_fast_vlm))
    wanted = get(vectors, rows)
    base = vectors.base
    base.__dict__["towers"] = {name: paths for name, paths in base.towers.items() if name != "projector"}
    found = ImageVectors(base, vectors.collator, batch_size=8)
    found._key = "another"
    np.testing.assert_allclose(get(found, rows), wanted, rtol=1e-4, atol=1e-5)


def test_other_pixels_under_the_same_name_have_another_vector(tiny_fast_vlm, make_recipe, closed_rows):
    recipe = make_recipe(tiny_fast_vlm)
    vectors, rows = vectors_of(recipe)
    before = get(vectors, rows[:1])
    Image.new("RGB", (32, 40), (1, 2, 3)).save(closed_rows / "images" / "0.png")
    vectors, rows = vectors_of(recipe)
    assert not np.allclose(get(vectors, rows[:1]), before) and vectors.num_new == 1


def test_a_batch_that_does_not_fit_is_halved(tiny_fast_vlm, make_recipe, closed_rows, monkeypatch, tmp_path):
    vectors, rows = vectors_of(make_recipe(tiny_fast_vlm))
    wanted = get(vectors, rows)
    forget(tmp_path)
    vectors, _ = vectors_of(make_recipe(tiny_fast_vlm))
    plain, sizes = vectors._features, []

    def features(inputs):
        sizes.append(len(inputs["pixel_values"]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(inputs)

    monkeypatch.setattr(vectors, "_features", features)
    np.testing.assert_allclose(get(vectors, rows), wanted, rtol=1e-4, atol=1e-5)
    assert sizes == [16, 8, 4, 4, 8, 4, 4, 2]


def test_processes_share_the_images(tiny_fast_vlm, make_recipe, closed_rows, monkeypatch, tmp_path):
    recipe = make_recipe(tiny_fast_vlm)
    alone, rows = vectors_of(recipe)
    wanted = get(alone, rows)
    forget(tmp_path)
    shares = []

    def gather(objects):  # the last process sees all
        shares.extend(objects)
        return shares

    monkeypatch.setattr("finetune.runs.image_vectors.gather_object", gather)
    for process in range(2):
        vectors, _ = vectors_of(recipe)
        assert vectors.fill(rows, SimpleNamespace(process_index=process, num_processes=2)) is None
    assert [(new, len(mine)) for _, new, mine in shares] == [(9, 9), (9, 9)] and vectors.num_new == 18
    np.testing.assert_allclose(vectors(rows), wanted, rtol=1e-4, atol=1e-5)
    shares.append(("ValueError: no tower", 0, {}))
    assert vectors.fill(rows, SimpleNamespace(process_index=0, num_processes=3)) == "ValueError: no tower"


def test_a_run_has_a_linear_probe(tiny_fast_vlm, make_recipe, closed_rows, capsys, tmp_path):
    recipe = make_recipe(tiny_fast_vlm, train={"max_steps": 6})
    result = train(recipe)
    shown = capsys.readouterr().out
    assert "questions with a closed set of answers: 1; 8 of 8 test rows; " in shown
    for scores in result.metrics.values():
        value = scores.baselines["linear_probe"]["exact_match"]
        assert (value.n, value.interval) == (8, None) and value.value > 0.5, "a random tower tells red from blue"
    assert shown.count(f", linear probe {value.value:.3f}") >= 2
    manifest = AdapterManifest.parse((result.adapter / "manifest.json").read_bytes())
    assert named_values(manifest.metrics)["test.linear_probe.exact_match"] == value.value
    assert "<th>linear probe</th>" in (result.folder / "samples.html").read_text()
    assert any(
        "a linear probe on the image features of the frozen base beats the adapter" in n for n in result.warnings
    )
    assert "warning: a linear probe" in shown

    again = train(make_recipe(tiny_fast_vlm, train={"max_steps": 6, "resume": "never"}))
    assert " images, 0 of them new; " in capsys.readouterr().out
    assert {who: one.to_json() for who, one in again.metrics.items()} == {
        who: one.to_json() for who, one in result.metrics.items()
    }


def test_a_run_without_a_closed_set_says_so(tiny_fast_vlm, make_recipe, capsys):
    result = train(make_recipe(tiny_fast_vlm))
    assert "linear probe off: no test row has an image and a question whose answers" in capsys.readouterr().out
    assert "linear_probe" not in result.metrics["test"].baselines


def test_a_probe_that_fails_stops_no_run(tiny_fast_vlm, make_recipe, closed_rows, capsys, monkeypatch):
    def fails(self, inputs):
        raise ValueError("no such\x1b tower")

    monkeypatch.setattr(ImageVectors, "_features", fails)
    result = train(make_recipe(tiny_fast_vlm))
    assert r"linear probe off: ValueError: 'no such\x1b tower'" in capsys.readouterr().out
    assert result.ref == "testing/squares@1" and "linear_probe" not in result.metrics["test"].baselines


def test_damaged_vectors_are_computed_again(tiny_fast_vlm, make_recipe, closed_rows, tmp_path):
    vectors, rows = vectors_of(make_recipe(tiny_fast_vlm))
    wanted = get(vectors, rows)
    with sqlite3.connect(tmp_path / "cache" / "image_vectors.sqlite") as connection:
        connection.execute("UPDATE notes SET note = substr(note, 1, 40)")
    connection.close()
    vectors, _ = vectors_of(make_recipe(tiny_fast_vlm))
    assert np.array_equal(get(vectors, rows), wanted) and vectors.num_new == 18


@pytest.mark.parametrize(
    ("adapted", "opens"), [("projector", False), ("language", True)], ids=["stored tower", "stored projector"]
)
def test_stored_outputs_of_the_tower_are_used(adapted, opens, tiny_fast_vlm, make_recipe, closed_rows, monkeypatch):
    """Where the projector is stored, what it gets is hollow, so the images are opened."""
    made = []

    class Spy(ImageVectors):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("finetune.runs.linear_probe.ImageVectors", Spy)
    method = {"name": "lora", "r": 4, "lora_alpha": 8, "towers": {"projector": "none", adapted: "all-linear"}}
    recipe = make_recipe(tiny_fast_vlm, method=method)
    result = train(recipe)
    (used,) = made
    assert result.metrics["test"].baselines["linear_probe"]["exact_match"].value > 0.5
    plain, rows = vectors_of(recipe)
    plain._key = "another"
    read = [row for row in rows if used._key_of(row) in used._vectors]
    assert len(read) >= 12 and (used._collator(read[0]) is used.collator) is opens
    np.testing.assert_allclose(used(read), get(plain, read), rtol=1e-4, atol=1e-5)

"""The feature store in whole runs: filled once, exact, noticed when a byte changes, off where it would not be exact."""

import json
import os
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from finetune.core.batch import Features
from finetune.core.example import Example, answer, as_images, ask
from finetune.core.hollow import hollow, is_hollow
from finetune.errors import TrainingError
from finetune.lookup import import_string
from finetune.runs.train import train
from finetune.tables import FAMILIES
from finetune.training.feature_store import (
    FeatureStore,
    StoredFeatures,
    is_whole,
    make_room,
    places_of,
    read,
    row_key,
)
from finetune.training.filling import Content, Filler
from finetune.training.loop import Trainer
from finetune.training.replay import record

LANGUAGE = {"towers": {"projector": "none"}}
TRAIN_ROWS = 18
ROWS = 26 + 1  # those of the squares, and a grey image


def features(tokens=3):
    return Features(
        outputs={
            "model.projector": (torch.randn(tokens, 4), hollow((tokens, 9), torch.bfloat16)),
            "model.tower": (torch.randn(1, tokens, 4),),
        },
        per_token=frozenset({"model.tower"}),
        processed={
            "rows": [[1]],
            "image_grid_thw": torch.tensor([[1, 2, 3]]),
            "pixel_values": hollow((1, 3, 8, 8), torch.float32, 1),
        },
        replacements=("<a><image><b>",),
    )


@pytest.fixture
def run(make_recipe, tiny_fast_vlm, tmp_path, capsys):
    """Return a function that runs a recipe on the squares: what it printed, its losses and its files of features."""

    def run(base=tiny_fast_vlm, **changes):
        changes = {"method": LANGUAGE, **changes}
        options = {"resume": "never", "logging_steps": 1, "max_steps": 5, **changes.pop("train", {})}
        recipe = make_recipe(base, train=options, **changes)
        train(recipe)
        lines = [json.loads(line) for line in (recipe.run_folder / "log.jsonl").read_text().splitlines()]
        printed = capsys.readouterr().out
        return SimpleNamespace(
            printed=printed,
            log_line=next(line for line in printed.splitlines() if line.startswith("feature store")),
            losses=[line["loss"] for line in lines if "loss" in line],
            predictions=(recipe.run_folder / "predictions-adapter.jsonl").read_text(),
            files=sorted((tmp_path / "cache" / "features").rglob("*.features")),
        )

    return run


@pytest.fixture
def sealed(monkeypatch):
    """While a Trainer trains, opening an image and running a tower or projector raise."""
    steps = Trainer.train

    def train_sealed(self, *args, **kwargs):
        def refuse(*args, **kwargs):
            raise AssertionError("an image was opened, or a tower ran")

        with monkeypatch.context() as patch:
            patch.setattr("finetune.data.images._opened", refuse)
            patch.setattr("finetune.data.media.open_image", refuse)
            towers = import_string(FAMILIES[self.plain_model.config.model_type].target)().towers(self.plain_model)
            for path in (*towers["vision"], *towers["projector"]):
                for module in list(self.plain_model.get_submodule(path).modules())[1:]:
                    patch.setattr(module, "forward", refuse)
            return steps(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train_sealed)


def test_a_filled_store_serves_every_adapter_and_no_tower_runs(tiny_base, run, sealed):
    stored = run(tiny_base, name="stored")
    assert re.match(f"feature store: up to model.*: the images of {ROWS} rows, {ROWS} of them new [(]", stored.log_line)
    assert len(stored.files) == ROWS
    again = run(tiny_base, name="again", method={**LANGUAGE, "r": 2})
    assert f"{ROWS} rows, 0 of them new" in again.log_line


def test_a_short_run_stores_only_what_it_reads(tiny_base, run, sealed):
    short = run(tiny_base, name="short", train={"max_steps": 1, "batch_size": 2})
    shown = 3  # train rows that the run shows
    assert ROWS - TRAIN_ROWS + shown <= len(short.files) <= ROWS - TRAIN_ROWS + shown + 2
    longer = run(tiny_base, name="longer", train={"max_steps": 2, "batch_size": 2})
    assert len(short.files) < len(longer.files) <= len(short.files) + 2


def test_a_short_run_is_the_same_with_the_store(tiny_base, run):
    stored, plain = (
        run(tiny_base, name=which, train={"max_steps": 2, "batch_size": 2, "feature_store": which})
        for which in ("auto", "off")
    )
    assert stored.losses == pytest.approx(plain.losses, abs=1e-5) and stored.predictions == plain.predictions


def test_the_seal_holds(run, sealed):
    with pytest.raises(AssertionError, match="an image was opened, or a tower ran"):
        run(train={"feature_store": "off"})


def test_losses_and_answers_are_those_without(tiny_base, run):
    stored, plain = run(tiny_base, name="one"), run(tiny_base, name="two", train={"feature_store": "off"})
    assert plain.log_line == "feature store off: train.feature_store is off"
    assert stored.losses == pytest.approx(plain.losses, abs=1e-5) and len(stored.losses) == 5
    assert stored.predictions == plain.predictions


def test_workers_read_the_store(run, sealed):
    assert run(name="here").losses == run(name="there", train={"num_workers": 2}).losses


@pytest.mark.parametrize("damage", ["a changed byte", "cut short", "gone"])
def test_damage_is_noticed_and_made_good(run, damage):
    first = run(name="first")
    victim = first.files[3]
    data = victim.read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        changed = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
        victim.write_bytes(changed if damage == "a changed byte" else data[: len(data) // 2])
    assert not is_whole(victim)
    second = run(name="second")
    assert f"{ROWS} rows, 1 of them new" in second.log_line
    assert victim.read_bytes() == data and second.losses == first.losses


def test_damage_during_a_run_stops_it(tmp_path):
    store = FeatureStore({"base": "x"})
    path = store.path(["0" * 64])
    store.put(path, features())
    image = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(image)
    row, other = (Example(id=i, messages=[], media=as_images([m]), answers=[]) for i, m in (("a", image), ("b", b"x")))
    stored = StoredFeatures({places_of([image]): path})
    assert stored([row], supervised=True)[0].replacements == features().replacements
    with pytest.raises(TrainingError, match="has stored no features of the images of row b. Start the run again"):
        stored([row, other], supervised=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrainingError, match="features of the images of row a were changed or removed on the disk. Sta"):
        stored([row], supervised=False)


def test_training_rows_have_features_of_their_own_where_their_text_counts(tmp_path):
    store = FeatureStore({"base": "x"})
    one, two = (Example(id=str(i), messages=[*ask("a"), answer(str(i))], media=(), answers=[]) for i in range(2))
    paths = {row_key(row): store.path([str(i)]) for i, row in enumerate((one, two))}
    for path in paths.values():
        store.put(path, features())
    stored = StoredFeatures({}).with_supervised(paths)
    found = [one.outputs["model.tower"][0] for one in stored([one, two], supervised=True)]
    assert not torch.equal(*found)
    assert stored([one], supervised=False) == [None]  # it has no image, and a prompt has other tokens
    other = Example(id="2", messages=[*ask("b"), answer("0")], media=(), answers=[])
    assert stored([one, other], supervised=True) == [None, None]  # a batch has features of one kind


def test_what_is_read_is_what_was_put():
    store, wanted = FeatureStore({"base": "x"}), features()
    path = store.path(["a", "b"])
    assert store.put(path, wanted) == path.stat().st_size
    found = read(path)
    assert list(found.outputs) == list(wanted.outputs) and found.replacements == wanted.replacements
    for name, tensors in wanted.outputs.items():
        assert all(torch.equal(x, y) for x, y in zip(found.outputs[name], tensors, strict=True))
    assert [is_hollow(tensor) for tensor in found.outputs["model.projector"]] == [False, True]
    assert found.outputs["model.projector"][1].dtype == torch.bfloat16 and found.per_token == wanted.per_token
    assert found.processed["rows"] == [[1]] and found.processed["image_grid_thw"].tolist() == [[1, 2, 3]]
    pixels = found.processed["pixel_values"]
    assert is_hollow(pixels) and pixels.shape == (1, 3, 8, 8) and bool((pixels == 1).all())
    assert store.path(["b", "a"]) != path != FeatureStore({"base": "y"}).path(["a", "b"])
    assert list(path.parent.iterdir()) == [path]


def test_equal_images_are_stored_once_wherever_they_stand(run, rows_folder):
    for i in range(2, 26, 2):
        (rows_folder / "images" / f"{i}.png").write_bytes((rows_folder / "images" / "0.png").read_bytes())
    assert len(run().files) == 15


def test_a_file_that_is_touched_during_a_run_keeps_its_features(run, rows_folder, monkeypatch):
    steps = Trainer.train

    def touched(self, *args, **kwargs):
        for path in (rows_folder / "images").iterdir():
            os.utime(path)
        return steps(self, *args, **kwargs)

    before = run(name="before").losses
    monkeypatch.setattr(Trainer, "train", touched)
    assert run(name="after").losses == before


def test_a_changed_image_has_features_of_its_own(run, rows_folder):
    run(name="first")
    Image.fromarray(np.full((40, 32, 3), 7, np.uint8)).save(rows_folder / "images" / "0.png")
    assert f"{ROWS} rows, 1 of them new" in run(name="second").log_line


PROJECTOR = [{"name": "lora", "towers": {"language": "none", "projector": "all-linear"}}]
BEGINS = {
    "projector, LoRA": (PROJECTOR, "model.vision_model"),
    "projector, dropout": ([{**PROJECTOR[0], "lora_dropout": 0.1}], "model.vision_model"),
    "projector, whole": ([{"name": "full_modules", "parameters": ["projector"]}], "model.vision_model"),
    "vision, last layer": (
        [{"name": "lora", "towers": {"language": "none", "vision": {"layers": "last 1"}}}],
        "model.vision_model.encoder.layers.0",
    ),
}


@pytest.mark.parametrize("begins", BEGINS)
def test_an_adapter_may_begin_above_the_tower(run, tiny_idefics3, begins):
    """Losses agree at each step, the tower runs once an image, and no image is opened in training."""
    method, end = BEGINS[begins]
    found = run(tiny_idefics3, name="stored", method=method, train={"max_steps": 50})
    plain = run(tiny_idefics3, name="plain", method=method, train={"max_steps": 50, "feature_store": "off"})
    assert found.log_line.startswith(f"feature store: up to {end}: the images of {ROWS} rows, {ROWS} of them new (")
    assert found.losses == pytest.approx(plain.losses, abs=1e-5) and len(found.losses) == 50
    assert found.predictions == plain.predictions and len(found.files) == ROWS


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora", "towers": {"language": {"layers": "last 1"}}},
        {"name": "lora", "towers": {"language": {"layers": [1]}}},
        {"name": "full_modules", "parameters": ["norms"], "layers": "1-1"},
    ],
    ids=["last", "list", "norms"],
)
def test_layers_below_the_adapter_run_once(run, tiny_idefics3, method):
    stored = run(tiny_idefics3, name="stored", method=[method], train={"max_steps": 50})
    plain = run(tiny_idefics3, name="plain", method=[method], train={"max_steps": 50, "feature_store": "off"})
    assert re.search(r"feature store: up to model.text_model.layers.0: \d+ rows, \d+ of them new", stored.printed)
    assert stored.losses == pytest.approx(plain.losses, abs=1e-5) and len(stored.losses) == 50
    assert stored.predictions == plain.predictions and len(stored.files) > ROWS


def test_a_tower_runs_once_an_image(run, tiny_idefics3, monkeypatch):
    calls = []
    forward = Idefics3VisionTransformer.forward

    def counted(self, pixel_values, **kwargs):
        calls.append(len(pixel_values))
        return forward(self, pixel_values, **kwargs)

    monkeypatch.setattr(Idefics3VisionTransformer, "forward", counted)
    sum_of = []
    for steps in (5, 30):
        calls.clear()
        found = run(tiny_idefics3, name=f"run{steps}", method=PROJECTOR, train={"max_steps": steps})
        sum_of.append(sum(calls))
        before = len(found.files)
    assert before == ROWS
    # Beside the images themselves, a run reads a few rows to find the boundary and to check it, and its probe; the
    # second run finds all images stored.
    assert sum_of[0] - sum_of[1] == ROWS


def test_it_is_off_where_the_first_layer_of_the_tower_trains(run, tiny_idefics3, monkeypatch):
    monkeypatch.setattr("finetune.training.find_boundaries._LEAST", 0.9)  # the embeddings are most of a tiny tower
    found = run(tiny_idefics3, method=[{"name": "lora", "towers": {"language": "none", "vision": "all-linear"}}])
    assert "feature store off: the adapter begins near the first layer of the vision tower" in found.log_line
    assert not found.files and len(found.losses) == 5


def test_it_is_off_where_there_is_no_room(run):
    found = run(train={"feature_store_max_bytes": 5000})
    assert re.search("off: .* are needed, but the disk of .* or train.feature_store_max_bytes .* less", found.log_line)
    assert len(found.files) == 2 + 4 and len(found.losses) == 5  # two are checked first; four show the size of all


def test_it_is_off_where_logits_would_differ(run, monkeypatch):
    def changed(*args):
        return {path: tuple(one * 1.01 for one in tensors) for path, tensors in record(*args).items()}

    monkeypatch.setattr("finetune.runs.frozen_features.record", changed)
    assert re.search(r"feature store off: the logits of row \S+ would differ by ", run().log_line)


def test_it_is_off_where_nothing_can_be_written(run, monkeypatch):
    def full(self, path, features):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureStore, "put", full)
    found = run()
    assert "cannot be written (No space left on device)" in found.log_line and len(found.losses) == 5


def test_room_is_made_of_what_no_run_has_used_for_a_week():
    store = FeatureStore({"base": "x"})
    paths = [store.path([str(i)]) for i in range(4)]
    size = [store.put(path, features()) for path in paths][0]
    for days, path in zip((0, 6, 8, 9), paths, strict=True):
        os.utime(path, (time.time() - 86400 * days,) * 2)
    assert make_room(size, max_bytes=4 * size)
    assert [path.exists() for path in paths] == [True, True, True, False]
    assert not make_room(size, max_bytes=2 * size)
    assert [path.exists() for path in paths] == [True, True, False, False]  # what may be in use stays
    assert is_whole(paths[1]) and time.time() - paths[1].stat().st_mtime < 60


def test_the_cap_is_held_where_rows_grow(make_filler):
    filler, made = make_filler(sizes=[1, 1, 1, 1] + [400] * 60, max_bytes=60_000)
    reason = filler.fill([row(i) for i in range(64)])
    assert isinstance(reason, str) and "are needed, but the disk of" in reason
    written = sum(path.stat().st_size for path in filler.store.folder.rglob("*.features"))
    assert 4 < len(made) < 20 and written < 2 * 60_000


def test_one_large_row_does_not_stop_what_fits(make_filler):
    filler, made = make_filler(sizes=[2000] + [1] * 30, max_bytes=200_000)
    assert isinstance(filler.fill([row(i) for i in range(31)]), dict) and len(made) == 31


def test_too_little_memory_for_the_tower_is_no_end(make_filler):
    filler, _ = make_filler(sizes=[1], max_bytes=10**9, error=torch.OutOfMemoryError("CUDA out of memory"))
    assert filler.fill([row(0)]) == "the device has too little memory for the tower"


def row(number):
    return Example(id=str(number), messages=[], media=as_images([np.full((2, 2, 3), number, np.uint8)]), answers=[])


@pytest.fixture
def make_filler():
    """Return a function: tokens of each row's features -> a Filler without a model, and the rows it computes."""

    def make(*, sizes, max_bytes, error=None):
        made = []

        def compute(row, images):
            if error:
                raise error
            made.append(1)
            return features(sizes[len(made) - 1])

        filler = Filler(
            store=FeatureStore({"base": "x"}),
            content=Content(
                title="the images of",
                key=lambda row: places_of(row.images),
                texts=lambda row: (),
                compute=compute,
                needs_images=True,
                has_features=lambda row: True,
            ),
            open_images=lambda row: [Image.fromarray(image) for image in row.images],
            max_bytes=max_bytes,
            accelerator=Accelerator(cpu=True),
            log=print,
        )
        return filler, made

    return make


def test_what_a_killed_process_left_aside_makes_room():
    store = FeatureStore({"base": "x"})
    path = store.path(["a"])
    store.put(path, features())
    aside = path.with_name(f".{path.name}.123")
    aside.write_bytes(b"half")
    make_room(0, max_bytes=10**9)
    assert aside.exists()  # its writer may live
    os.utime(aside, (0, 0))
    make_room(0, max_bytes=10**9)
    assert not aside.exists() and path.exists()

"""Files that were changed with their times kept, as ``cp -p`` and ``rsync --times`` do: nothing old is believed."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from PIL import Image as PILImage

from finetune.adapters import base_identity
from finetune.adapters.base_identity import file_digest, identify_base
from finetune.assemble.base import Base
from finetune.assemble.loading import load_base
from finetune.core import file_state
from finetune.core.cache import cache_home
from finetune.data.image_checks import IMAGES, look_at
from finetune.data.images import image_digest
from finetune.errors import BaseMismatchError, ModelError, StoppedError, TrainingError
from finetune.recipe import HubData, ParquetData, SavedData
from finetune.runs.train import train
from finetune.serving.vision_language_model import VisionLanguageModel
from finetune.training.loop import Trainer
from tests.data.conftest import read_rows
from tests.serving.adapters import make_adapter

pytestmark = pytest.mark.usefixtures("rested")


@pytest.fixture
def hashed(monkeypatch):
    """Note which files are hashed."""
    names = []
    digest = base_identity.hashlib.file_digest

    def noted(file, name):
        names.append(os.path.basename(file.name))
        return digest(file, name)

    monkeypatch.setattr(base_identity.hashlib, "file_digest", noted)
    return names


def flip(path):
    """Changes a byte of a file in place, and puts its times back."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)


def test_a_file_is_hashed_once_and_again_after_a_boot(tmp_path, hashed, monkeypatch):
    path = tmp_path / "w"
    path.write_bytes(b"one")
    first = file_digest(path)
    assert file_digest(path) == first and hashed == ["w"]
    monkeypatch.setattr(file_state, "boot_id", lambda: "another")
    assert file_digest(path) == first and hashed == ["w"] * 2
    assert file_digest(path) == first and hashed == ["w"] * 2
    flip(path)
    assert file_digest(path) != first and hashed == ["w"] * 3


def test_machines_that_share_a_cache_hash_a_file_once_each(tmp_path, hashed, monkeypatch):
    (tmp_path / "w").write_bytes(b"one")
    for boot in ("here", "there", "here", "there"):
        monkeypatch.setattr(file_state, "boot_id", lambda boot=boot: boot)
        file_digest(tmp_path / "w")
    assert hashed == ["w"] * 2


def test_a_file_that_was_just_written_is_hashed_each_time(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(file_state, "_rest_seconds", lambda path, device: 2.0)
    path = tmp_path / "w"
    path.write_bytes(b"one")
    assert len({file_digest(path), file_digest(path)}) == 1 and hashed == ["w"] * 2


def test_a_file_of_the_hub_cache_is_what_its_bytes_are_and_not_its_name(tmp_path, hashed):
    data = b"weights"
    blob = tmp_path / "blobs" / base_identity.sha256_hex(data)
    blob.parent.mkdir()
    blob.write_bytes(data)
    (tmp_path / "model.safetensors").symlink_to(blob)
    for _ in range(2):
        assert file_digest(tmp_path / "model.safetensors") == blob.name
    assert hashed == [blob.name]
    flip(blob)
    for _ in range(2):
        with pytest.raises(ModelError, match=f"must hold a large file under its SHA-256.* delete {blob} and download"):
            file_digest(tmp_path / "model.safetensors")


def test_an_adapter_refuses_a_changed_base_though_its_probe_has_a_receipt(tiny_fast_vlm, tmp_path, monkeypatch):
    path = tmp_path / "base"
    shutil.copytree(tiny_fast_vlm, path)
    base = load_base(str(path), device="cpu")
    adapter = make_adapter(base, "lora", tmp_path / "adapter")
    VisionLanguageModel(base).add(adapter)
    monkeypatch.setattr(Base, "probe", lambda *args: 1 / 0)
    VisionLanguageModel(load_base(str(path), device="cpu")).add(adapter)  # by its receipt
    flip(path / "model.safetensors")
    with pytest.raises(BaseMismatchError, match="model.safetensors has sha256"):
        VisionLanguageModel(load_base(str(path), device="cpu")).add(adapter)
    assert identify_base(str(path)) == identify_base(str(path), verify="full")


def image(path, value):
    PILImage.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def repaint(path, value):
    """Write another image into a file, and put its times back."""
    times = path.stat()
    image(path, value)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_changed_image_is_looked_at_again(tmp_path, monkeypatch):
    path = tmp_path / "a.bmp"
    image(path, 1)
    (old,) = look_at([path], max_pixels=100)
    with monkeypatch.context() as patch:
        patch.setattr("finetune.data.image_checks.look", lambda *args, **options: 1 / 0)
        assert look_at([path], max_pixels=100) == [old]
    repaint(path, 2)
    (new,) = look_at([path], max_pixels=100)
    assert new.digest == image_digest(path) != old.digest


def test_a_changed_image_that_a_table_names_is_looked_at_again(tmp_path):
    image(tmp_path / "a.bmp", 1)
    columns = {"image": [{"bytes": None, "path": "a.bmp"}], "question": ["?"], "answer": ["a"]}
    column = {"bytes": Value("binary"), "path": Value("string")}
    kinds = Features({"image": column, "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(columns, features=kinds).save_to_disk(tmp_path / "train")
    section = SavedData(source="saved", root=str(tmp_path), val=None, test=None)
    digests = []
    for value in (1, 2):
        repaint(tmp_path / "a.bmp", value)
        (row,) = read_rows(section)
        assert row.meta[IMAGES] == [image_digest(tmp_path / "a.bmp")]
        digests += row.meta[IMAGES]
    assert len(set(digests)) == 2


def test_a_changed_table_is_read_again(tmp_path):
    path = tmp_path / "train.parquet"

    def write(answer):
        pq.write_table(pa.table({"question": ["?"], "answer": [answer]}), path)

    write("old")
    times = path.stat()
    section = ParquetData(source="parquet", root=str(tmp_path), image=None)
    assert read_rows(section)[0].answers == ["old"]
    write("new")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and read_rows(section)[0].answers == ["new"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_changed_data_set_is_converted_again_and_only_then(tmp_path, streaming):
    path = tmp_path / "set" / "train.parquet"
    path.parent.mkdir()
    options = {"streaming": streaming, "image": None, "val": None, "test": None}
    section = HubData(source="hub", name="some/set", root=str(path.parent), **options)
    for answer in ("old", "new"):
        times = path.stat() if path.exists() else None
        pq.write_table(pa.table({"question": ["?"], "answer": [answer]}), path)
        if times:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        (row,) = read_rows(section)
        assert row.answers == [answer]
    before = sorted((cache_home() / "datasets").iterdir())
    (path.parent / ".cache").mkdir()
    (path.parent / ".cache" / "metadata").touch()
    read_rows(section)
    assert sorted((cache_home() / "datasets").iterdir()) == before


@pytest.fixture
def stopped(make_recipe, tiny_fast_vlm, rows_folder, monkeypatch):
    """A recipe whose run was stopped in its third step; its first train row has two images."""
    path = rows_folder / "train.jsonl"
    first, *others = path.read_text().splitlines()
    row = json.loads(first)
    path.write_text("\n".join([json.dumps({**row, "image": None, "images": [row["image"], "images/2.png"]}), *others]))
    options = {"epochs": 1.0, "max_steps": None, "batch_size": 4, "save_steps": 1}
    recipe = make_recipe(tiny_fast_vlm, train=options)
    update = Trainer._update

    def stop(self, *args):
        if self.state.step + 1 == 3:
            os.kill(os.getpid(), 15)
        return update(self, *args)

    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr(Trainer, "_update", stop)
        train(recipe)
    return recipe


@pytest.mark.parametrize("left", [b"", bytes(200), b'{"name": "x"'], ids=["empty", "NULs", "cut"])
def test_a_run_goes_on_though_its_recipe_was_damaged(stopped, left):
    """As a power cut leaves the file of a version that did not wait for the disk."""
    recipe = stopped.run_folder / "recipe.json"
    whole = json.loads(recipe.read_text())
    recipe.write_bytes(left)
    result = train(stopped)
    assert result.adapter.exists() and json.loads(recipe.read_text()) == whole
    recipe.write_bytes(left)  # of the finished run, which is kept
    with pytest.raises(TrainingError, match="holds a finished run"):
        train(stopped)


@pytest.mark.parametrize(
    ("name", "split"), [("0.png", "train"), ("2.png", "train"), ("19.png", "val"), ("25.png", "test")]
)
def test_a_run_does_not_go_on_with_other_images(stopped, rows_folder, name, split):
    path = rows_folder / "images" / name
    before = path.read_bytes()
    repaint(path, 7)
    with pytest.raises(TrainingError, match=f"another unfinished run .*images.{split} was .* and is now"):
        train(stopped)
    path.write_bytes(before)
    assert train(stopped).adapter.exists()


def test_a_run_goes_on_with_images_that_were_only_moved_and_reads_none_again(stopped, rows_folder, monkeypatch):
    for path in sorted((rows_folder / "images").iterdir()):
        copy = path.with_suffix(".copy")
        shutil.copy(path, copy)
        copy.replace(path)
    look_at(sorted((rows_folder / "images").iterdir()), max_pixels=10**6)
    monkeypatch.setattr("finetune.data.image_checks.look", lambda *args, **options: 1 / 0)
    assert train(stopped).adapter.exists()

"""The recipes for public data sets read folders that are laid out as the hub lays them out, with the same columns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoProcessor

from finetune.assemble.rows import examples_of
from finetune.data.images import open_image
from finetune.lookup import import_string, look_up
from finetune.recipe import load_recipe
from finetune.runs.train import train
from finetune.tables import FAMILIES as KNOWN
from tests.tiny import FAMILIES

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
VQA = ("image", "question", "answer")
FASHION = (
    "id", "gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "year", "usage",
    "productDisplayName", "image",
)  # fmt: skip
# name on the hub -> columns, and the rows of each split here
SETS = {
    "flaviagiammarino/vqa-rad": (VQA, {"train": 20, "test": 4}),
    "mdwiratathya/SLAKE-vqa-english": (VQA, {"train": 8, "validation": 3, "test": 4}),
    "flaviagiammarino/path-vqa": (VQA, {"train": 30, "validation": 3, "test": 4}),
    "ashraq/fashion-product-images-small": (FASHION, {"train": 40}),
}
RECIPES = {
    "medical/vqa_rad_smolvlm.yaml": {"train": 18, "val": 2, "test": 4},
    "medical/slake_qwen2_5_vl.yaml": {"train": 8, "val": 3, "test": 4},
    "medical/path_vqa_paligemma.yaml": {"train": 30, "val": 3, "test": 4},
    "medical/three_sets_smolvlm.yaml": {"train": 80, "val": 6, "test": 12},
    "retail/fashion_smolvlm.yaml": {"train": 36, "val": 2, "test": 2},
}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The folder of each data set, with data/SPLIT-00000-of-00001.parquet and images as JPEG bytes inside."""
    root = tmp_path_factory.mktemp("hub")
    rng = np.random.default_rng(0)
    for name, (columns, splits) in SETS.items():
        for split, count in splits.items():
            values = {column: [f"{column} {i % 7}" for i in range(count)] for column in columns}
            mode = "CMYK" if "path" in name else "RGB"
            noise = rng.integers(0, 255, (count, 30, 40, 3), dtype=np.uint8)
            folder = root / name / "data"
            folder.mkdir(parents=True, exist_ok=True)
            values["image"] = []
            for i, pixels in enumerate(noise):
                file = folder / "x.jpg"
                PILImage.fromarray(pixels).convert(mode).save(file)
                values["image"].append({"bytes": file.read_bytes(), "path": f"{i}.jpg"})
                file.unlink()
            if "year" in values:
                values["year"] = [2012.0] * count
            table = Dataset.from_dict(values).cast_column("image", Image())
            table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return root


def names(data):
    """Yield each hub section of a recipe with the key that its folder is set by."""
    parts = (
        {"data": data} if data.source == "hub" else {f"data.sources.{n}.data": p.data for n, p in data.sources.items()}
    )
    return {key: part.name for key, part in parts.items()}


@pytest.mark.parametrize("config", RECIPES)
def test_the_data_of_a_recipe_is_read(hub, config):
    plain = load_recipe(CONFIGS / config)
    roots = [f"{key}.root={hub / name}" for key, name in names(plain.data).items()]
    recipe = load_recipe(CONFIGS / config, roots)
    for split, count in RECIPES[config].items():
        examples = examples_of(recipe, split)
        assert len(examples) == count
        assert all(len(e.images) == 1 and e.answers[0] and e.messages[-1]["role"] == "assistant" for e in examples)
        assert open_image(examples[0].images[0]).size == (40, 30)
    question = examples[0].prompt[-1]["content"][-1]["text"]
    assert examples[0].meta["question"] in question
    if config.startswith("retail"):
        assert examples[0].answers[0].startswith("articleType") and question == "What kind of article is this?"


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Family -> the folder of its tiny model as the hub lays one out: shards, their index, the processor's files."""
    folders = {}
    for family in ("smolvlm", "qwen2_5_vl", "paligemma"):
        plain = FAMILIES[family](tmp_path_factory.mktemp("plain") / family)
        folder = tmp_path_factory.mktemp("hub") / family
        AutoModelForImageTextToText.from_pretrained(plain).save_pretrained(folder, max_shard_size="50KB")
        AutoProcessor.from_pretrained(plain).save_pretrained(folder)
        assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").exists()
        folders[family] = folder
    return folders


def family_name(config):
    """The family that a recipe's file is named after."""
    return next(name for name in ("smolvlm", "qwen2_5_vl", "paligemma") if config.endswith(f"{name}.yaml"))


@pytest.mark.parametrize("model_type", ["smolvlm", "qwen2_5_vl", "paligemma"])
def test_the_towers_stand_in_models_of_the_real_size_too(model_type):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type]())
    towers = import_string(look_up(KNOWN, model_type, what="family").target)().towers(model)
    for _, paths in towers.items():
        linears = [m for path in paths for m in model.get_submodule(path).modules() if isinstance(m, torch.nn.Linear)]
        assert linears


@pytest.mark.parametrize("config", RECIPES)
def test_a_recipe_runs_on_a_tiny_base_of_its_family(hub, bases, config, tmp_path, capsys):
    roots = [f"{key}.root={hub / name}" for key, name in names(load_recipe(CONFIGS / config).data).items()]
    few = ["train.epochs=null", "train.max_steps=2", "train.batch_size=2", f"train.output_dir={tmp_path}"]
    if "qwen" in config:
        few.append("data.max_length=null")  # the tiny one takes 256 tokens
    base = [f"model.name_or_path={bases[family_name(config)]}", "model.dtype=float32", "model.device=cpu"]
    recipe = load_recipe(CONFIGS / config, [*roots, *few, *base])
    assert train(recipe).ref == f"{recipe.adapter.publish}@1"
    assert capsys.readouterr().out.count("⟦") == 3


def test_each_recipe_documents_how_to_get_its_data():
    for config in RECIPES:
        header = (CONFIGS / config).read_text().split("\nname:")[0]
        recipe = load_recipe(CONFIGS / config)
        assert "Not run in full size" in header and "hf download" in header
        assert all(name.split("/")[1].split("-")[0].lower() in header.lower() for name in names(recipe.data).values())

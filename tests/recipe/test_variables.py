"""Environment variables in a recipe: put into places alone, and their values stay in the run's own folder."""

import json
from typing import Annotated, get_args

import pytest

from finetune.errors import RecipeError
from finetune.recipe import AdapterSection, Recipe, load_recipe, parse_recipe
from finetune.recipe.published import published_recipe
from finetune.recipe.recipe_file import _section
from finetune.runs.train import train

SECRET = "s3cr3t-0f-th15-m4ch1n3"
RAW = {
    "name": "brain",
    "domain": "medical",
    "model": {"name_or_path": "org/model"},
    "method": {"name": "lora"},
    "data": {"source": "jsonl", "root": "here"},
    "task": {"name": "vqa"},
    "train": {"epochs": 2},
}
PROMPTS = {"system_prompt", "question_template", "text_template", "default_question", "prompt_tuning_init_text",
           "caption_question"}  # fmt: skip
# What chooses each section among others.
CHOICES = {
    "data": [{"source": "jsonl", "root": "a"}, {"source": "parquet", "root": "a"}, {"source": "saved", "root": "a"},
             {"source": "hub", "name": "a/b"}, {"source": "procedural", "name": "medical"}],
    "method": [{"name": "lora"}, {"name": "prompt_tuning"}, {"name": "full_modules", "parameters": ["norms"]}],
    "task": [{"name": "vqa"}, {"name": "contrastive"}],
    "model": [RAW["model"]], "train": [RAW["train"]], "adapter": [{}],
}  # fmt: skip


def texts_of(key, chosen):
    """Return the fields of a chosen section that take a text."""
    field = Recipe.model_fields[key]
    section = _section(Annotated[field.annotation, *field.metadata, ...], chosen)
    return [name for name, field in section.model_fields.items() if _takes_text(field.annotation)]


def _takes_text(annotation):
    return annotation is str or any(_takes_text(part) for part in get_args(annotation) if not isinstance(part, str))


CASES = [(key, chosen, name) for key, all_ in CHOICES.items() for chosen in all_ for name in texts_of(key, chosen)]


def test_every_section_is_tried():
    assert {"name_or_path", "root", "train", "output_dir", "init_from", "license", *PROMPTS} <= {c[2] for c in CASES}
    assert len(CASES) > 60


@pytest.mark.parametrize(("key", "chosen", "name"), CASES)
def test_no_key_publishes_the_value_of_a_variable(key, chosen, name, monkeypatch):
    monkeypatch.setenv("PLANTED", SECRET)
    text = {"question_template": "${PLANTED} {question}", "text_template": "${PLANTED} {label}"}.get(name, "${PLANTED}")
    raw = {**RAW, key: {**chosen, name: text}}
    try:
        recipe = parse_recipe(raw, source="test")
    except RecipeError as error:
        assert SECRET not in str(error) and f"{key}.{name}" in str(error)
        return
    assert SECRET not in json.dumps(published_recipe(recipe))
    held = recipe.model_dump(mode="json")[key]
    value = (held[0] if isinstance(held, list) else held)[name]
    assert value == (text if name in PROMPTS else SECRET)
    assert (value == SECRET) == (name in {"name_or_path", "root", "train", "val", "test", "output_dir", "init_from"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.license", "${PLANTED}"), ("adapter.intended_use", "for ${PLANTED}"),
        ("adapter.aliases", ["${PLANTED}"]),
        ("model.revision", "${PLANTED}"), ("model.device", "${PLANTED}"), ("data.question", "${PLANTED}"),
        ("data.ignore", ["a", "${PLANTED}"]), ("method.towers.language.target_modules", ["${PLANTED}"]),
        ("method.towers.vision_2.target_modules", ["${PLANTED}"]),
    ],
)  # fmt: skip
def test_elsewhere_it_is_one_error_that_names_the_key(key, value, monkeypatch, tmp_path):
    monkeypatch.setenv("PLANTED", SECRET)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(RAW))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [f"{key}={json.dumps(value)}"])
    assert f"{path}: {key}: environment variables are allowed only in paths and in model.name_or_path, got " in str(
        caught.value
    )
    assert SECRET not in str(caught.value) and f"as {key}=VALUE" in str(caught.value)


def test_sections_inside_a_mix_are_places_too(monkeypatch):
    monkeypatch.setenv("PLANTED", SECRET)
    source = {"data": {"source": "jsonl", "root": "${PLANTED}", "train": "${PLANTED}.jsonl"}}
    recipe = parse_recipe({**RAW, "data": {"source": "mix", "sources": {"a": source}}}, source="test")
    assert recipe.data.sources["a"].data.train == f"{SECRET}.jsonl"
    assert SECRET not in json.dumps(published_recipe(recipe))


@pytest.mark.parametrize("seed", [-1, 2**31, 2**64])
def test_a_seed_is_one_that_every_library_takes(seed):
    with pytest.raises(RecipeError, match="seed: Input should be"):
        parse_recipe({**RAW, "seed": seed}, source="test")
    with pytest.raises(RecipeError, match="data.seed: Input should be"):
        data = {"source": "procedural", "name": "medical", "seed": seed}
        parse_recipe({**RAW, "data": data}, source="test")


def test_a_place_has_no_nul():
    with pytest.raises(RecipeError, match="train.output_dir: a path must not contain a NUL character"):
        parse_recipe({**RAW, "train": {"epochs": 1, "output_dir": "a\0b"}}, source="test")


def test_nothing_that_leaves_the_run_holds_the_value_of_a_variable(
    make_recipe, tiny_fast_vlm, rows_folder, tmp_path, monkeypatch
):
    """Planted in every key in which variables are put, then looked for in every byte that is published or tracked."""
    parent = train(make_recipe(tiny_fast_vlm, name="parent")).adapter
    hidden = tmp_path / SECRET
    hidden.mkdir()
    places = {"BASE": tiny_fast_vlm, "DATA": rows_folder, "PARENT": parent}
    for name, place in places.items():
        (hidden / name).symlink_to(place)
    for split in ("train", "val", "test"):
        (rows_folder / f"{SECRET}-{split}.jsonl").write_bytes((rows_folder / f"{split}.jsonl").read_bytes())
    monkeypatch.setenv("PLANTED", str(hidden))
    monkeypatch.setenv("PREFIX", SECRET)
    recipe = make_recipe(
        "${PLANTED}/BASE",
        data={"root": "${PLANTED}/DATA", **{split: f"${{PREFIX}}-{split}.jsonl" for split in ("train", "val", "test")}},
        train={"output_dir": "${PLANTED}/runs", "trackers": ["tensorboard"]},
        adapter={"init_from": "${PLANTED}/PARENT"},
    )
    fields = AdapterSection.model_fields.keys() - {"init_from"}
    assert fields == {"publish", "aliases", "license", "intended_use"}, "no other key takes a variable"
    result = train(recipe)
    registry = [path for path in (tmp_path / "registry").rglob("*") if path.is_file()]
    tracked = [path for path in (result.folder / "trackers").rglob("*") if path.is_file()]
    own = [path for path in result.folder.rglob("*.*") if path.parent.name in ("adapter", "best", "last")]
    pages = [result.folder / "samples.html", result.folder / "samples.txt"]
    assert len(registry) > 4 and tracked and len(own) > 4
    for path in (*registry, *tracked, *own, *pages):
        assert SECRET.encode() not in path.read_bytes(), path

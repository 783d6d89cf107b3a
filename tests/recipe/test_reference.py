"""The recipe reference: current, complete, and with examples, defaults and links that hold."""

import re
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.errors import RecipeError
from finetune.recipe import FullModulesSection, Recipe, TrainSection, parse_recipe, read_value
from finetune.recipe.key_types import listed_values
from finetune.recipe.reference import anchor, recipe_tables, reference_text
from finetune.recipe.schema import recipe_schema
from tests.docs_code import blocks

PAGE = "recipe.md"
FILE = Path(__file__).parents[2] / "docs" / PAGE
TEXT = FILE.read_text(encoding="utf-8")
KEYS = [key for table in recipe_tables() for key in table.keys]
ROWS = [
    [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in TEXT.splitlines()
    if line.startswith("| `")
]
CELLS = list(zip(KEYS, ROWS, strict=False))
IDS = [f"{key.section.__name__}.{key.name}" for key, _ in CELLS]


def value(cell):
    """Return the value that a cell of the page shows."""
    assert re.fullmatch(r"`[^`]+`", cell), cell
    return read_value(cell[1:-1], source=PAGE)


def needed(key):
    """Return examples for the keys without which the section of a key is refused."""
    fields = key.section.model_fields
    raw = {name: field for name, field in fields.items() if field.is_required() and name != key.name}
    of = {other.name: value(row[-1]) for other, row in CELLS if other.section is key.section and other.name in raw}
    if key.section is TrainSection and key.name not in ("epochs", "max_steps"):
        of["epochs"] = 1
    if key.section is FullModulesSection and key.name == "layers":
        of["parameters"] = ["norms"]
    return of


def test_the_file_is_current(capsys, tmp_path):
    assert reference_text() == TEXT, "run `finetune schema --markdown docs/recipe.md`"
    assert main(["schema", "--markdown"]) == 0
    assert capsys.readouterr().out == TEXT
    assert main(["schema", "--markdown", str(tmp_path / "there.md")]) == 0
    assert (tmp_path / "there.md").read_text(encoding="utf-8") == TEXT


def test_every_key_of_the_schema_has_a_row():
    schema = recipe_schema()
    tables = {anchor(table.title): table for table in recipe_tables()}
    shown = {}
    for table in tables.values():
        for section in table.sections:
            rows = table.keys
            if not rows:  # one of several sections: its own table, and those that it leads to
                names = section.model_fields.keys() & {"source"} or {"name"}
                name = listed_values(schema["$defs"][section.__name__]["properties"][names.pop()])[0]
                own = tables[anchor(f"{table.title} {name}")]
                rows = [
                    *own.keys,
                    *(key for link in re.findall(r"\(#([^)]*)\)", own.intro) for key in tables[link].keys),
                ]
            shown[section.__name__] = {key.name for key in rows}
    assert shown == {name: {*part["properties"]} for name, part in (*schema["$defs"].items(), ("Recipe", schema))}
    assert [row[0] for row in ROWS] == [f"`{key.path}`" for key in KEYS]


@pytest.mark.parametrize(("key", "row"), CELLS, ids=IDS)
def test_a_row_is_complete_and_its_example_is_read(key, row):
    path, kind, default, meaning, example = row
    assert all(row) and meaning.endswith(".")
    read = key.section.model_validate({**needed(key), key.name: value(example)}, context=set())
    if default != "**required**" and not re.fullmatch("`[^`]*`", kind):  # a type of one value has no other example
        assert getattr(read, key.name) != key.field.get_default(call_default_factory=True, validated_data={})


@pytest.mark.parametrize(
    ("key", "row"), [pair for pair in CELLS if pair[1][2] != "**required**"], ids=lambda it: getattr(it, "path", "")
)
def test_a_default_that_is_shown_is_the_default(key, row):
    shown = value(row[2])
    if key.name in ("epochs", "max_steps"):
        assert shown is None and key.field.default is None
        return
    written = key.section.model_validate({**needed(key), key.name: shown}, context=set())
    left_out = key.section.model_validate(needed(key), context=set())
    assert getattr(written, key.name) == getattr(left_out, key.name)


@pytest.mark.parametrize("key", [key for key in KEYS if key.field.is_required()], ids=lambda key: key.path)
def test_what_is_marked_required_is_required(key):
    with pytest.raises(ValueError, match=rf"{key.name}\n  Field required"):
        key.section.model_validate(needed(key), context=set())


def test_the_first_recipe_of_the_page_is_complete():
    (text,) = blocks(PAGE, "yaml")
    raw = read_value(text, source=PAGE)
    assert parse_recipe(raw, source=PAGE).run_folder.name == "clothing"
    for key in [name for name in raw if Recipe.model_fields[name].is_required()]:
        with pytest.raises(RecipeError, match=f"{key}: this key is missing"):
            parse_recipe({name: part for name, part in raw.items() if name != key}, source=PAGE)


def test_every_link_leads_to_one_heading():
    headings = [anchor(line.lstrip("# ")) for line in TEXT.splitlines() if re.match("#+ ", line)]
    assert len(set(headings)) == len(headings)
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= set(headings)
    assert all((FILE.parent / name).is_file() for name in re.findall(r"\]\(([^#)][^)]*\.md)\)", TEXT))

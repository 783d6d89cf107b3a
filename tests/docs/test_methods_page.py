"""docs/methods.md: the table of exports says what the targets really take."""

import re

import pytest

from finetune.adapters.folder import read_folder
from finetune.assemble.loading import load_base
from finetune.errors import ExportError
from finetune.export.gguf import Gguf
from finetune.export.merged import Merged
from finetune.export.peft import Peft
from finetune.export.vllm import Vllm
from finetune.tables import METHODS, METHODS_OF_TASKS, PEFT_PROMPTS
from tests.docs_code import sections
from tests.serving.adapters import KINDS, make_adapter

TABLE = re.findall(
    r"^\| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$",
    sections("methods.md")["What can be merged and exported"],
    re.MULTILINE,
)[1:]
ROWS = {  # name of the row -> one of KINDS
    "`lora` on the language model": "lora",
    "`lora`, also on projector or vision": "patterns",
    "`lora` with `use_rslora`": "wide lora",
    "`lora` with `use_dora`": "dora",
    "`prompt_tuning`": "prompt",
    "`full_modules`": "full_modules",
    "a list with `prompt_tuning`": "everything",
}


@pytest.fixture(scope="module")
def base():
    return load_base("pocket", device="cpu")


def test_the_table_has_these_rows():
    assert {row[0] for row in TABLE} == ROWS.keys() and set(ROWS.values()) <= KINDS.keys()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_exports(row, base, tmp_path):
    name, *cells = row
    manifest = read_folder(make_adapter(base, ROWS[name], tmp_path / "adapter")).manifest
    for target, cell in zip((Peft(), Merged(), Vllm(), Gguf()), cells, strict=True):
        if cell.startswith("`"):  # families, and the pocket model is of none of them
            assert {family.strip("` ") for family in cell.split(",")} == {*PEFT_PROMPTS}
            cell = "no"
        if cell == "yes":
            target.refuse(manifest)
        else:
            with pytest.raises(ExportError):
                target.refuse(manifest)


def test_every_method_has_its_words():
    text = "".join(sections("methods.md").values())
    for method in METHODS.keys() - {*METHODS_OF_TASKS}:
        assert f"`{method}`" in text

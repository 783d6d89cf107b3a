"""The names of tasks, families and architectures stand in their own files and in tables, and nowhere else."""

import ast
from pathlib import Path

import pytest

import finetune
from finetune import tables

ROOT = Path(finetune.__file__).parents[1]
FILES = [*sorted((ROOT / "finetune").rglob("*.py")), *sorted((ROOT / "recipes").glob("*.py"))]
ARCHITECTURES = {entry.architecture for entry in tables.FAMILIES.values()}

# File -> why it may name a task beside its own file and the table.
TASK_FILES = {
    "finetune/adapters/manifest_schema_1.py": "vqa: the normalization of answers, as schema 1 had it",
    "finetune/core/example.py": "caption: the purpose of a draw",
    "finetune/data/survey.py": "caption: the form of a row",
    "finetune/evaluation/prompt_checks.py": "caption: the form of a row",
    "finetune/metrics/normalization.py": "vqa: the normalization that the VQA script defines",
    "finetune/pocket/questions.py": "caption: a question type of the pocket world",
    "finetune/recipe/objective.py": "contrastive: the objective's own section",
    "recipes/pretrain.py": "vqa: the normalization of answers",
}
# File -> why it may name families.
FAMILY_FILES = {
    "finetune/export/llama_cpp.py": "the table of what llama.cpp takes",
    "finetune/export/vllm_rules.py": "the table of what vLLM takes",
}
# File -> why it may name an architecture.
ARCHITECTURE_FILES = {
    "finetune/export/gguf.py": "takes this architecture alone, and refuses any other",
    "finetune/export/onnx.py": "takes this architecture alone, and refuses any other",
    "finetune/recipe/task.py": "what tasks of one architecture share says which it is",
    "finetune/server/run.py": "takes this architecture alone, and refuses any other",
    "recipes/pretrain.py": "what the pocket model is",
}


def strings(path):
    """Yield the texts of a file that are no docstrings, with their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(node, ast.Expr) or not isinstance(child, ast.Constant) or not isinstance(child.value, str):
                continue
            yield child.value, child.lineno


def found(names, own):
    """Return (file, name) of every name outside of the folder of its own and of the tables."""
    places = set()
    for path in FILES:
        where = path.relative_to(ROOT).as_posix()
        if where != "finetune/tables.py" and not where.startswith(own):
            places |= {(where, text) for text, _ in strings(path) if text in names}
    return places


@pytest.mark.parametrize(
    ("names", "own", "allowed"),
    [
        (set(tables.TASKS), "finetune/tasks/", TASK_FILES),
        (set(tables.FAMILIES), "finetune/families/", FAMILY_FILES),
        (ARCHITECTURES, "finetune/families/", ARCHITECTURE_FILES),
    ],
    ids=["tasks", "families", "architectures"],
)
def test_names_stand_in_their_own_files(names, own, allowed):
    strange = {(where, name) for where, name in found(names, own) if where not in allowed}
    assert not strange, "move what depends on the name into its own file, or make it a table"
    assert {where for where, _ in found(names, own)} == set(allowed), "a file no longer needs to be allowed"


def test_a_task_stands_in_its_file_alone():
    for name in tables.TASKS:
        inside = [path.name for path in (ROOT / "finetune" / "tasks").glob("*.py") if name in dict(strings(path))]
        assert inside == [f"{name}.py"]


def test_exact_match_stands_in_at_most_two_files():
    where = {path.name for path in FILES for text, _ in strings(path) if text == "exact_match"}
    assert where == {"exact_match.py", "tables.py"}


def test_the_search_sees_a_name(tmp_path):
    (tmp_path / "a.py").write_text('"""vqa"""\nx = {"vqa": 1}\nif y == "clip":\n    pass\n')
    assert [text for text, _ in strings(tmp_path / "a.py")] == ["vqa", "clip"]

"""The arrows between rooms point downward, files are small, and what must answer at once loads no torch."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import finetune

ROOT = Path(finetune.__file__).parent
LEVELS = {
    "errors": 0, "lookup": 0,
    "core": 1, "tables": 1, "interfaces": 1,
    "plugins": 2, "launch": 2,
    "metrics": 3, "model_types": 3,
    "recipe": 4,
    "families": 5, "methods": 5, "data": 5, "adapters": 5, "pocket": 5, "objectives": 5,
    "tasks": 6, "training": 6, "registry": 6,
    "assemble": 7,
    "serving": 8,
    "preflight": 9,
    "export": 10, "evaluation": 10, "server": 10, "playground": 10,
    "runs": 11, "vllm_plugin": 11,
    "demo": 12,
    "cli": 13,
}  # fmt: skip
REGISTRY_LEVELS = {
    "trust": 0, "storage": 1, "log": 2, "reader": 3, "registry": 4, "differences": 5, "promotion": 6,
    "transfer": 5, "maintenance": 5, "__init__": 7, "cli": 8,
}  # fmt: skip


def _room(module: str) -> str:
    return module.split(".")[1]


def _imports(path: Path, *, for_types: bool = False):
    """Yield the finetune modules that a file imports at run time, or also ``for_types``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in type_only and not for_types:
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if names:
            places = {alias.name: ROOT.parent.joinpath(*names[0].split("."), alias.name) for alias in node.names}
            inner = [name for name, place in places.items() if place.is_dir() or place.with_suffix(".py").is_file()]
            names = [f"{names[0]}.{name}" for name in inner] + (names if len(inner) < len(places) else [])
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name for name in names if name.startswith("finetune."))


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_below(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in LEVELS, f"{own} has no level; add it to LEVELS"
    for name in _imports(path):
        room = _room(name)
        if room == own:
            continue
        assert LEVELS[room] < LEVELS[own], f"{path} (level {LEVELS[own]}) imports {name} (level {LEVELS[room]})"


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_relative_to(ROOT / "registry")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_file_of_the_registry_imports_only_from_below(path):
    own = path.relative_to(ROOT / "registry").parts[0].removesuffix(".py")
    for name in _imports(path, for_types=True):
        _, room, *rest = name.split(".")
        if room != "registry":
            continue
        part = rest[0] if rest else "__init__"
        assert part == own or REGISTRY_LEVELS[part] < REGISTRY_LEVELS[own], f"{path} imports {name}"


def test_no_files_import_each_other():
    modules = {".".join(("finetune", *p.relative_to(ROOT).with_suffix("").parts)): p for p in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    imported = {name: {*_imports(path, for_types=True)} & modules.keys() - {name} for name, path in modules.items()}
    graphlib.TopologicalSorter(imported).prepare()  # raises CycleError, which names the files of a circle


@pytest.mark.parametrize(
    "module",
    ["finetune", "finetune.registry", "finetune.recipe", "finetune.cli", "finetune.tables", "finetune.preflight"],
)
def test_loads_no_heavy_library(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_are_sorted_and_there():
    assert finetune.__all__ == sorted(finetune.__all__, key=str.swapcase) or finetune.__all__ == sorted(
        finetune.__all__
    )
    for name in finetune.__all__:
        assert getattr(finetune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        finetune.nonsense  # noqa: B018


def test_every_name_in_a_table_is_there():
    from finetune import tables
    from finetune.lookup import import_string

    places = (tables.METHODS, tables.METRICS, tables.TASKS, tables.OBJECTIVES, tables.SOURCES, tables.EXPORT_TARGETS)
    targets = [target for table in (*places, tables.EMBEDDED_BASES) for target in table.values()]
    for target in (*targets, *tables.FAMILIES.values(), tables.GENERIC_FAMILY):
        found = [target] if isinstance(target, str) else [target.target, getattr(target, "config", None)]
        assert all(callable(import_string(place)) for place in found if place), target


def test_the_table_of_families_matches_their_classes():
    from finetune.families.generic import GenericFamily
    from finetune.lookup import import_string
    from finetune.tables import FAMILIES, GENERIC_FAMILY

    for model_type, entry in FAMILIES.items():
        family = import_string(entry.target)
        assert (family.model_type, family.architecture) == (model_type, entry.architecture)
        assert tuple(family.tower_paths) == entry.towers, model_type
    assert GenericFamily.architecture == GENERIC_FAMILY.architecture


def test_no_library_advises_kernels_that_nothing_here_needs():
    import logging

    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, functions) and _length(node) > 60]
    assert not long


def _length(node):
    return node.end_lineno - node.lineno + 1

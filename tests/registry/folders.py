import json
from pathlib import Path

from finetune.registry.log.commits import Commit


def same(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    return {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def edit(folder: Path, **fields) -> None:
    """Give the manifest of an adapter folder other fields."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def forge(entry: Path, **fields) -> None:
    """Change an entry of a log, as an attacker would who can write valid entries."""
    commit = Commit.parse(entry.read_bytes(), source=entry.name)
    entry.write_bytes(commit.model_copy(update=fields).to_bytes())

from pathlib import Path


def same(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    return {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}

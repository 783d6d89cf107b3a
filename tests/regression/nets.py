"""The nets that are stored here, a folder for each release, and what every test of them needs."""

import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NETS = sorted((path.parent for path in HERE.glob("*/net.json")), key=lambda net: [*map(int, net.name.split("."))])


def contents(net: Path) -> dict:
    """Return what a net holds: ``adapters``, ``registry`` and ``recipes``, each with the families of their bases."""
    return json.loads((net / "net.json").read_text(encoding="utf-8"))


def each(kind: str) -> pytest.MarkDecorator:
    """Run a test for each of what the nets hold of a kind, as ``net, name, family``."""
    cases = [(net, name, family) for net in NETS for name, family in contents(net)[kind].items()]
    ids = [f"{net.name}-{name}" for net, name, _ in cases]
    return pytest.mark.parametrize(("net", "name", "family"), cases, ids=ids)

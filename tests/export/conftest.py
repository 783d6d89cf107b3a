"""What exports start from: tiny bases and finished adapters of random weights."""

import pytest

from finetune.assemble.loading import load_base
from tests.serving.adapters import make_adapter
from tests.tiny import FAMILIES


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Return a function: the folders of a tiny base and of an adapter for it, made once."""
    folder, bases = tmp_path_factory.mktemp("saved"), {}

    def make(family="llava", kind="lora", strength=1.0):
        if family not in bases:
            bases[family] = str(FAMILIES[family](folder / family))
        adapter = folder / f"{family}-{kind}-{strength:g}"
        if not adapter.exists():
            make_adapter(load_base(bases[family], device="cpu"), kind, adapter, strength=strength)
        return bases[family], adapter

    return make

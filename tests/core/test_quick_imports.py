"""Imports without garbage collection, which goes on afterwards."""

import gc
import sys

import pytest

from finetune.core.quick_imports import quick_imports


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_inside_and_all_is_exempt_afterwards(monkeypatch):
    gc.unfreeze()
    with quick_imports():
        assert not gc.isenabled()
        monkeypatch.setitem(sys.modules, "a_new_module", sys)
    assert gc.isenabled() and gc.get_freeze_count() > 0


def test_without_a_new_module_nothing_is_exempt():
    gc.unfreeze()
    before = gc.get_freeze_count()
    with quick_imports():
        import json  # noqa: F401
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_collection_goes_on_after_an_error_and_stays_off_where_it_was():
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    with quick_imports():
        pass
    assert not gc.isenabled()

"""The stored bases as folders that can be loaded, and a copy of each stored registry."""

import shutil

import pytest

from tests.regression.bases import build_base
from tests.regression.nets import NETS


@pytest.fixture(scope="package")
def bases(tmp_path_factory):
    """Net -> the folder with a folder for each of its bases."""
    folder = tmp_path_factory.mktemp("bases")
    for net in NETS:
        for stored in (net / "bases").iterdir():
            build_base(stored, folder / net.name / stored.name)
    return {net: folder / net.name for net in NETS}


@pytest.fixture
def registry_copy(tmp_path):
    """Return a function: net -> a copy of its registry, so that nothing is written into the stored one."""
    return lambda net: shutil.copytree(net / "registry", tmp_path / "stored-registry")

"""Every file of the cache damaged, as after a power cut: everything still works, and the cache is made good."""

import shutil

import pytest

import finetune
from finetune.core.cache import cache_home
from finetune.registry import AdapterRegistry
from finetune.runs.train import train
from tests.core.test_cache import DAMAGE

pytestmark = pytest.mark.usefixtures("rested")


def work(make_recipe, base, rows_folder):
    """Train, lists, and ask; return what was answered."""
    method = {"towers": {"language": "all-linear"}}  # so that features are stored
    result = train(make_recipe(base, method=method, train={"max_steps": 1, "resume": "never"}))
    (version,) = AdapterRegistry().list()
    assert version.ref == result.ref
    vlm = finetune.load(result.ref, device="cpu")  # on the base that the run has noted
    return vlm.ask(rows_folder / "images" / "0.png", "What color is it?")


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_as_none(make_recipe, tiny_fast_vlm, rows_folder, damage):
    answer = work(make_recipe, tiny_fast_vlm, rows_folder)
    there = files(cache_home())
    kinds = {path.parts[0] for path in there}
    assert kinds >= {"bases", "digests", "probes", "registries", "features", "images.sqlite", "image_tokens.sqlite"}
    for path in there:
        whole = (cache_home() / path).read_bytes()
        (cache_home() / path).write_bytes(DAMAGE[damage](whole))
    assert work(make_recipe, tiny_fast_vlm, rows_folder) == answer
    assert there <= files(cache_home())


def test_folders_where_files_should_be_are_as_none(make_recipe, tiny_fast_vlm, rows_folder):
    work(make_recipe, tiny_fast_vlm, rows_folder)
    for path in [cache_home() / path for path in files(cache_home())]:
        path.unlink()
        path.mkdir()
    train(make_recipe(tiny_fast_vlm, name="other", train={"max_steps": 1}))
    shutil.rmtree(cache_home())

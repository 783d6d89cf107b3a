"""Which adapters stay ready, and what names stand for meanwhile."""

import threading
from types import SimpleNamespace

import pytest

from finetune.assemble.loading import load_base
from finetune.errors import AdapterError, NotFoundError, StoreError, TrustError
from finetune.registry import AdapterRegistry
from finetune.serving.adapter_cache import AdapterCache
from finetune.serving.aliases import Aliases
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.matrix import rows
from tests.serving.adapters import make_adapter


class AdapterHooks:
    """Counts what is left in the model."""

    def __init__(self):
        self.left = []

    def remove(self, updates):
        self.left.append(updates)


class Adapter:
    def __init__(self, name, num_bytes=40):
        self.ref = self.digest = self.updates = name
        self.num_bytes = num_bytes


def names(cache):
    return [one.ref for one in cache.loaded_adapters]


def test_the_least_recently_used_goes_first():
    hooks = AdapterHooks()
    cache = AdapterCache(hooks, max_bytes=100)
    a, b, c = Adapter("a"), Adapter("b"), Adapter("c")
    cache.put(a)
    cache.put(b)
    assert cache.hold(a)
    cache.let_go(a)
    cache.put(c)
    assert names(cache) == ["a", "c"] and hooks.left == ["b"]
    assert cache.num_bytes == 80
    assert not cache.hold(b)


def test_what_answers_stays_until_its_last_request_ends():
    hooks = AdapterHooks()
    cache = AdapterCache(hooks, max_bytes=100)
    a, b, c = Adapter("a"), Adapter("b"), Adapter("c")
    for one in (a, b):
        cache.put(one)
        assert cache.hold(one)
    cache.hold_again(a)
    cache.put(c)
    assert names(cache) == ["a", "b", "c"] and cache.num_bytes == 120, "over the budget, as all are in use"
    cache.let_go(a)
    assert hooks.left == []
    cache.let_go(a)
    assert names(cache) == ["b", "c"] and hooks.left == ["a"]
    cache.let_go(b)
    assert names(cache) == ["b", "c"]


def test_what_is_removed_while_it_answers_leaves_the_model_later():
    hooks = AdapterHooks()
    cache = AdapterCache(hooks)
    a = Adapter("a")
    cache.put(a)
    assert cache.hold(a)
    cache.remove("a")
    assert names(cache) == [] and hooks.left == []
    cache.let_go(a)
    assert hooks.left == ["a"]
    with pytest.raises(AdapterError, match="a cannot be removed, because it is not loaded. Loaded adapters: none"):
        cache.remove(a)


def test_one_that_alone_is_too_large_is_refused():
    hooks = AdapterHooks()
    cache = AdapterCache(hooks, max_bytes=100)
    with pytest.raises(AdapterError, match="together may take 100 bytes, and .*big alone takes 101"):
        cache.put(Adapter("big", 101))
    assert hooks.left == ["big"] and names(cache) == []


def version(number):
    return SimpleNamespace(version=number)


def ignore(one):
    """Accepts every signature."""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_an_alias_is_looked_up_again_when_its_time_is_over():
    clock, asked = Clock(), []

    def renew(ref):
        asked.append(ref)
        return version(len(asked))

    aliases = Aliases(renew, ignore, seconds=10, clock=clock)

    def found(ref, **how):
        return aliases.version(ref, **how).version

    assert [found("a/b@prod"), found("a/b@prod")] == [1, 1]
    clock.now = 10
    assert [found("a/b@prod"), found("a/b@prod")] == [2, 2]
    assert found("a/b@prod", now=True) == 3
    assert found("a/b@17") == 4
    clock.now = 1000
    assert found("a/b@17") == 4, "a number always stands for the same version"
    aliases.renew_all()
    assert found("a/b@prod") == 5


def test_a_failed_look_up_keeps_what_is_known_and_warns_once():
    clock = Clock()
    answers = {"a/b@prod": 1}

    def renew(ref):
        if ref not in answers:
            raise StoreError("the disk is gone")
        return version(answers[ref])

    aliases = Aliases(renew, ignore, seconds=10, clock=clock)
    assert aliases.version("a/b@prod").version == 1
    del answers["a/b@prod"]
    clock.now = 10
    with pytest.warns(UserWarning, match="a/b@prod still answers with version 1: .* the disk is gone"):
        assert aliases.version("a/b@prod").version == 1
    clock.now = 20
    assert aliases.version("a/b@prod").version == 1  # a second warning would be an error here
    answers["a/b@prod"] = 2
    clock.now = 30
    assert aliases.version("a/b@prod").version == 2
    with pytest.raises(StoreError, match="the disk is gone"):
        aliases.version("a/other")


def test_what_is_no_longer_signed_is_not_kept():
    clock, revoked = Clock(), []

    def check(one):
        if revoked:
            raise TrustError("the key is revoked")

    def renew(ref):
        check(None)
        return version(1)

    aliases = Aliases(renew, check, seconds=10, clock=clock)
    assert aliases.version("a/b").version == 1
    revoked.append(True)
    assert aliases.version("a/b").version == 1, "for as long as it is taken for granted"
    clock.now = 10
    with pytest.raises(TrustError, match="the key is revoked"):
        aliases.renew_all()
    with pytest.raises(TrustError, match="the key is revoked"):
        aliases.version("a/b")


def test_no_request_waits_for_a_look_up():
    clock, began, go = Clock(), threading.Event(), threading.Event()

    def renew(ref):
        if clock.now:
            began.set()
            assert go.wait(30)
        return version(2 if clock.now else 1)

    aliases = Aliases(renew, ignore, seconds=10, clock=clock)
    aliases.version("a/b")
    clock.now = 10
    thread = threading.Thread(target=aliases.version, args=("a/b",))
    thread.start()
    assert began.wait(30)
    assert aliases.version("a/b").version == 1
    go.set()
    thread.join()
    assert aliases.version("a/b").version == 2


def test_an_app_follows_an_alias_and_stays_within_its_bytes(tiny_fast_vlm, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    base = load_base(str(tiny_fast_vlm), device="cpu")
    registry = AdapterRegistry(tmp_path / "registry")
    for seed in (1, 2, 3):
        registry.publish(make_adapter(base, "lora", tmp_path / f"v{seed}", seed=seed))
    name = registry.list()[0].full_name
    registry.alias(name, "prod", 1)
    size = VisionLanguageModel(base).add(tmp_path / "v1").num_bytes
    vlm = VisionLanguageModel(load_base(str(tiny_fast_vlm), device="cpu"), registry=registry, max_bytes=2 * size)

    def answering(ref):
        with vlm.using(ref) as model:
            model.ask(rows(1)[0].images[0], "What color is it?")
            return vlm.adapter.digest

    digests = {number: registry.resolve(f"{name}@{number}").digest for number in (1, 2, 3)}
    assert answering(f"{name}@prod") == digests[1]
    registry.alias(name, "prod", 2)
    assert answering(f"{name}@prod") == digests[1], "it was looked up a moment ago"
    vlm.switcher.refresh()
    assert answering(f"{name}@prod") == digests[2]
    assert answering(f"{name}@3") == digests[3]
    assert [one.digest for one in vlm.switcher.loaded_adapters] == [digests[2], digests[3]]
    with vlm.using(f"{name}@prod"):
        registry.yank(f"{name}@2")
        with pytest.warns(UserWarning, match="@prod still answers with version 2: .*is yanked"):
            vlm.switcher.refresh()
        assert vlm.adapter.digest == digests[2]
    with pytest.raises(NotFoundError, match="nothing@prod|no adapter"):
        vlm.add("medical/nothing@prod")

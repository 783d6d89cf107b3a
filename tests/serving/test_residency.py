"""Which adapters stay ready, and what names stand for meanwhile."""

import threading
from types import SimpleNamespace

import pytest

from finetune.build import load_base
from finetune.errors import AdapterError, NotFoundError, StoreError, TrustError
from finetune.registry import AdapterRegistry
from finetune.serving.aliases import Aliases
from finetune.serving.app import VisionLanguageModel
from finetune.serving.residency import Residency
from tests.matrix import rows
from tests.serving.adapters import make_adapter


class Points:
    """Counts what is left in the model."""

    def __init__(self):
        self.left = []

    def remove(self, updates):
        self.left.append(updates)


class Adapter:
    def __init__(self, name, num_bytes=40):
        self.ref = self.digest = self.updates = name
        self.num_bytes = num_bytes


def names(residency):
    return [one.ref for one in residency.residents]


def test_the_least_recently_used_goes_first():
    points = Points()
    residency = Residency(points, max_bytes=100)
    a, b, c = Adapter("a"), Adapter("b"), Adapter("c")
    residency.put(a)
    residency.put(b)
    assert residency.hold(a)
    residency.let_go(a)
    residency.put(c)
    assert names(residency) == ["a", "c"] and points.left == ["b"]
    assert residency.num_bytes == 80
    assert not residency.hold(b)


def test_what_answers_stays_until_its_last_request_ends():
    points = Points()
    residency = Residency(points, max_bytes=100)
    a, b, c = Adapter("a"), Adapter("b"), Adapter("c")
    for one in (a, b):
        residency.put(one)
        assert residency.hold(one)
    residency.hold_again(a)
    residency.put(c)
    assert names(residency) == ["a", "b", "c"] and residency.num_bytes == 120, "over the budget, as all are in use"
    residency.let_go(a)
    assert points.left == []
    residency.let_go(a)
    assert names(residency) == ["b", "c"] and points.left == ["a"]
    residency.let_go(b)
    assert names(residency) == ["b", "c"]


def test_what_is_removed_while_it_answers_leaves_the_model_later():
    points = Points()
    residency = Residency(points)
    a = Adapter("a")
    residency.put(a)
    assert residency.hold(a)
    residency.remove("a")
    assert names(residency) == [] and points.left == []
    residency.let_go(a)
    assert points.left == ["a"]
    with pytest.raises(AdapterError, match="a is not resident, so it cannot be removed; there are: none"):
        residency.remove(a)


def test_one_that_alone_is_too_large_is_refused():
    points = Points()
    residency = Residency(points, max_bytes=100)
    with pytest.raises(AdapterError, match="big holds 101 bytes, and all resident adapters together may hold 100"):
        residency.put(Adapter("big", 101))
    assert points.left == ["big"] and names(residency) == []


def version(number):
    return SimpleNamespace(version=number)


def ignore(one):
    """Vouches for anything."""


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


def test_a_failed_look_up_keeps_what_is_known_and_says_so_once():
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


def test_what_nobody_vouches_for_any_more_is_not_kept():
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


def test_nobody_waits_for_a_look_up():
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
    assert [one.digest for one in vlm.switcher.residents] == [digests[2], digests[3]]
    with vlm.using(f"{name}@prod"):
        registry.yank(f"{name}@2")
        with pytest.warns(UserWarning, match="@prod still answers with version 2: .*is yanked"):
            vlm.switcher.refresh()
        assert vlm.adapter.digest == digests[2]
    with pytest.raises(NotFoundError, match="nothing@prod|no adapter"):
        vlm.add("medical/nothing@prod")

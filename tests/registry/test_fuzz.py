"""Any object of one adapter may hold anything: what is read is whole, or an error of ours, and no other is hidden."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from finetune.errors import FinetuneError
from finetune.registry import AdapterRegistry, verify
from tests.safety.test_fuzz import mutated_text, mutated_value

pytestmark = pytest.mark.usefixtures("no_sync")
WHOLE, DAMAGED = "medical/a", "medical/b"


@pytest.fixture
def stage(registry, make_adapter, tmp_path, monkeypatch):
    """A registry, its objects of one adapter alone, the folders of that, and what is read of it while it is whole."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    folder = Path(registry.location)
    registry.publish(make_adapter(WHOLE), aliases=["prod"])
    before = set(folder.rglob("*"))
    versions = [make_adapter(DAMAGED, seed=number) for number in range(2)]
    for version in versions:
        registry.publish(version, aliases=["prod"])
    registry.alias(DAMAGED, "stable", 1)
    own = sorted(path for path in set(folder.rglob("*")) - before if path.is_file())
    return folder, own, versions, answers(folder, tmp_path / "pulled")


def answers(folder, into):
    """Return what is read of the damaged adapter; each an answer, or the name of an error of ours."""
    registry, reported = AdapterRegistry(folder), []
    found = {}

    def ask(what, call):
        shutil.rmtree(into, ignore_errors=True)
        try:
            found[what] = call()
        except FinetuneError as error:
            found[what] = type(error)
            assert str(error) and len(str(error)) < 3000, error

    listed = registry.list("medical", onerror=lambda name, error: reported.append(name))
    assert WHOLE in [version.full_name for version in listed], "another adapter is hidden"
    assert set(reported) <= {DAMAGED}
    assert registry.resolve(f"{WHOLE}@prod").full_name == WHOLE
    ask("listed", lambda: [(v.full_name, v.version, v.digest) for v in listed if v.full_name != WHOLE] or FinetuneError)
    ask("resolved", lambda: registry.resolve(f"{DAMAGED}@prod").digest)
    ask("first", lambda: registry.resolve(f"{DAMAGED}@1").digest)
    ask("pulled", lambda: sorted(p.read_bytes() for p in registry.pull(f"{DAMAGED}@prod", into=into).iterdir()))
    ask("log", lambda: len(registry.log(DAMAGED)))
    ask("verified", lambda: len(verify(registry).problems))
    return found


def fuzz(stage, into, number):
    folder, own, versions, wanted = stage
    outcomes = Counter()
    digests = [wanted["first"], wanted["resolved"]]
    contents = [sorted(path.read_bytes() for path in version.iterdir()) for version in versions]
    known = {"resolved": digests, "first": digests, "pulled": contents}

    @seed(0)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(choice=st.integers(0, 2**63))
    def check(choice):
        rng = random.Random(choice)
        path = rng.choice(own)
        kept = path.read_bytes()
        try:
            path.chmod(0o644)
            data = mutated_text(rng, kept)
            if rng.random() < 0.5 and kept.startswith(b"{"):
                data = json.dumps(mutated_value(rng, json.loads(kept))).encode(errors="replace")
            path.write_bytes(data)
            found = answers(folder, into)
            for what, allowed in known.items():  # an alias may be moved, where nothing is signed; bytes may not
                assert isinstance(found[what], type) or found[what] in allowed, (what, path)
                outcomes[what, getattr(found[what], "__name__", "known")] += 1
        finally:
            path.write_bytes(kept)

    check()
    assert outcomes["resolved", "known"] and len({name for _, name in outcomes}) > 1, outcomes
    assert answers(folder, into) == wanted


def test_thirty_damages(stage, tmp_path):
    fuzz(stage, tmp_path / "pulled", 30)


@pytest.mark.slow
def test_a_thousand_damages(stage, tmp_path):
    fuzz(stage, tmp_path / "pulled", 1000)

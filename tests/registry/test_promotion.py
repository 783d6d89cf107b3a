"""Aliases that are moved only to versions that are good enough."""

from pathlib import Path

import pytest

from finetune.errors import (
    ConditionError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    PromotionError,
    RegistryError,
    YankedError,
)
from finetune.registry import AdapterRegistry, verify
from finetune.registry.log.commits import Gate
from finetune.registry.log.conditions import Condition
from finetune.registry.promotion import promote
from tests.registry.folders import edit, forge
from tests.scores import scores_json

pytestmark = pytest.mark.usefixtures("no_sync")
NAME = "medical/brain-mri"


@pytest.fixture
def two(registry, make_adapter):
    """The first version answers 61 % of the test rows, the second 74 %."""
    for seed, score in enumerate((0.61, 0.74)):
        folder = make_adapter(seed=seed)
        base, test = (scores_json(value, n=100, question_types={"tumor": 0.9}) for value in (0.4, score))
        edit(folder, metrics={"base": base, "test": test})
        registry.publish(folder)
    return registry


def _state(registry):
    return {p: p.read_bytes() for p in Path(registry.location).rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "require",
    [
        ["test.exact_match>=0.70"],
        ["test.exact_match>=0.74", "test.exact_match<=0.74", "test.n>99"],
        ["base.exact_match < 0.5", "test.tumor.exact_match == 0.9", "test.majority.exact_match<=.5"],
        [Condition(path="test.n", op=">", value=99.0)],
    ],
)
def test_a_version_that_is_good_enough(two, require):
    version = promote(two, f"{NAME}@2", "prod", require=require)
    assert (version.version, version.aliases) == (2, ("latest", "prod"))
    entry = two.log(NAME)[-1]
    assert entry.op == "alias" and entry.gate.forced == []
    assert entry.gate.required == [str(Condition.parse(each) if isinstance(each, str) else each) for each in require]
    assert verify(two).problems == []


@pytest.mark.parametrize(
    ("require", "message"),
    [
        (["test.exact_match>=0.70"], r"cannot promote .* to prod: test.exact_match>=0.7: it is 0.61\. Nothing was"),
        (["test.n>=100", "test.exact_match>0.61"], r"prod: test.exact_match>0.61: it is 0.61\. Nothing"),
        (["test.n>100", "test.exact_match>0.7"], r"test.n>100: it is 100; test.exact_match>0.7: it is 0.61\."),
        (
            ["test.exakt_match>=0"],
            "there is no such metric. Did you mean .*There are: test.exact_match, test.n",
        ),
        (["test.tumor>=0"], "there is no such metric"),
        (["test.interval>=0"], "there is no such metric"),
        (["exact_match>=0"], "there is no such metric"),
    ],
)
def test_a_version_that_is_not_is_refused_with_the_figures(two, require, message):
    before = _state(two)
    with pytest.raises(PromotionError, match=message):
        promote(two, f"{NAME}@1", "prod", require=require)
    assert _state(two) == before


def test_an_adapter_that_was_never_evaluated_meets_nothing(registry, make_adapter):
    folder = make_adapter()
    edit(folder, metrics={})
    registry.publish(folder)
    with pytest.raises(PromotionError, match="test.exact_match>=0: there is no such metric. There are: none"):
        promote(registry, NAME, "prod", require=["test.exact_match>=0"])


def test_force_is_recorded(two):
    require = ["test.exact_match>=0.70", "test.n>=50", "test.f1>=0.5"]
    assert promote(two, f"{NAME}@1", "prod", require=require, force=True).version == 1
    gate = two.log(NAME)[-1].gate
    assert gate.required == ["test.exact_match>=0.7", "test.n>=50", "test.f1>=0.5"]
    assert gate.forced[0] == "test.exact_match>=0.7: it is 0.61" and len(gate.forced) == 2
    assert gate.forced[1].startswith("test.f1>=0.5: there is no such metric.")
    two.rollback(NAME, "prod", to=2)
    assert [entry.gate is None for entry in two.log(NAME)] == [True, True, False, True]
    assert verify(two).problems == []
    promote(two, f"{NAME}@1", "prod", require=["test.n>=50"], force=True)
    assert two.log(NAME)[-1].gate == Gate(required=["test.n>=50"], forced=[]), "there was nothing to force"


def test_the_bytes_of_the_manifest_count_and_not_the_log(two):
    version = two.resolve(f"{NAME}@2")
    entry = Path(two.location, "names", NAME, "log", "000000000002.json")
    forge(entry, summary={"metrics": {"test": {"exact_match": 0.99}}})
    lied = AdapterRegistry(two.location)
    assert lied.resolve(f"{NAME}@2").summary["metrics"]["test"]["exact_match"] == 0.99
    with pytest.raises(PromotionError, match="it is 0.74"):
        promote(lied, f"{NAME}@2", "prod", require=["test.exact_match>=0.9"])
    blob = Path(two.location, "blobs", "sha256", version.digest[:2], version.digest)
    blob.write_bytes(blob.read_bytes().replace(b"0.74", b"0.99"))
    for force in (False, True):
        with pytest.raises(IntegrityError, match=f"{version.digest}: its sha256 is"):
            promote(lied, f"{NAME}@2", "prod", require=["test.exact_match>=0.9"], force=force)


def test_it_is_an_alias_in_every_other_way(two):
    good = ["test.n>=1"]
    with pytest.raises(ConflictError, match="'prod' must point to version 1 .`expect`., but points to no version"):
        promote(two, f"{NAME}@2", "prod", require=good, expect=1)
    promote(two, f"{NAME}@2", "prod", require=good, expect=0)
    assert len(two.log(NAME)) == 3
    promote(two, f"{NAME}@latest", "prod", require=good, expect=2)
    assert len(two.log(NAME)) == 3, "it points to it already"
    two.yank(f"{NAME}@1")
    with pytest.raises(YankedError):
        promote(two, f"{NAME}@1", "prod", require=good, force=True)
    with pytest.raises(NotFoundError, match="medical/brain-mri has versions 1 to 2"):
        promote(two, f"{NAME}@3", "prod", require=good)
    with pytest.raises(ConditionError, match="a condition must be .* got 'test.n'"):
        promote(two, f"{NAME}@2", "prod", require=["test.n"])
    with pytest.raises(RegistryError, match="`require` must hold at least one condition, got none"):
        promote(two, f"{NAME}@2", "prod", require=[])

"""The adapters that can be chosen, the reasons against the others, and their signers in words."""

import shutil
from pathlib import Path

import pytest

from finetune.adapters.reference import as_folder
from finetune.errors import NotFoundError
from finetune.playground.catalog import CatalogEntry, read_catalog
from finetune.playground.markup import table
from finetune.registry import AdapterRegistry
from tests.playground.conftest import altered
from tests.registry.signed import key, policy
from tests.scores import scores_json


def test_the_latest_of_each_with_what_the_log_knows(registry, made, tmp_path):
    metrics = {"base": scores_json(0.25), "test": scores_json(1.0, question_types={"color": 1.0})}
    registry.publish(altered(made[1]["first"], tmp_path / "again", name="first", metrics=metrics))
    first, foreign, second = read_catalog(registry, [], made[0].identity)
    assert [entry.name for entry in (first, foreign, second)] == ["testing/first", "testing/foreign", "testing/second"]
    assert (first.ref, first.version, first.aliases, first.refusal) == ("testing/first@2", 2, ("latest",), None)
    assert [first.values[name] for name in ("base.exact_match", "test.exact_match", "test.n")] == [0.25, 1.0, 40.0]
    assert (first.metrics, second.metrics, second.values) == (["exact_match"], [], {})
    assert (second.ref, second.synthetic) == ("testing/second@1", True)
    assert foreign.refusal.startswith("trained on another base: someone/other-base, identity ")


def test_what_cannot_be_read_is_offered_last_with_the_reason(registry, made):
    entry = Path(registry.location, "names/testing/first/log/000000000001.json")
    entry.write_bytes(entry.read_bytes()[:-9])
    *whole, damaged = read_catalog(AdapterRegistry(registry.location), [], made[0].identity)
    assert [entry.name for entry in whole] == ["testing/foreign", "testing/second"]
    assert (damaged.name, damaged.version, damaged.synthetic, damaged.values) == ("testing/first", None, False, {})
    assert damaged.refusal.startswith("cannot be read: names/testing/first/log/000000000001.json: not JSON")
    assert ">folder<" not in table([damaged], where="here")


def test_those_that_are_named_and_nothing_else(registry, made):
    folder = str(made[1]["second"])
    entries = read_catalog(registry, ["testing/first@prod", folder, "testing/first@prod"], made[0].identity)
    assert [(entry.name, entry.ref, entry.version) for entry in entries] == [
        ("testing/first@prod", "testing/first@1", 1),
        (folder, folder, None),
    ]
    assert [entry.refusal for entry in entries] == [None, None]
    assert entries[1].signature == "not signed"


def test_a_folder_stays_one_that_would_read_as_a_reference(registry, made, tmp_path, monkeypatch):
    shutil.copytree(made[1]["second"], tmp_path / "testing" / "first")
    monkeypatch.chdir(tmp_path)
    (entry,) = read_catalog(registry, ["./testing/first"], made[0].identity)
    assert as_folder(entry.ref) == tmp_path / "testing" / "first"


def test_a_reference_that_stands_for_nothing_is_an_error(registry, made):
    with pytest.raises(NotFoundError, match="testing/frist"):
        read_catalog(registry, ["testing/frist"], made[0].identity)


def test_what_is_yanked_cannot_be_chosen(registry, made):
    registry.yank("testing/first@1", reason="wrong rows")
    refusals = {entry.name: entry.refusal for entry in read_catalog(registry, [], made[0].identity)}
    assert refusals["testing/first"] == "yanked: wrong rows"
    assert refusals["testing/second"] is None


@pytest.mark.parametrize(
    ("demand", "signer", "signature", "refusal"),
    [
        ("off", None, "not signed", None),
        ("off", "alice", "signed, not checked", None),
        ("warn", "alice", "signed by alice", None),
        ("warn", None, "not signed", None),
        ("require", "alice", "signed by alice", None),
        ("require", None, "not signed", "the trust policy does not accept it: it is not signed"),
    ],
)
def test_its_signer_is_shown(demand, signer, signature, refusal, made, tmp_path):
    place = tmp_path / "signed"
    folder = altered(made[1]["first"], tmp_path / "mine", name="mine", namespace="medical")
    AdapterRegistry(place, signer=key(signer) if signer else None).publish(folder)
    asked = policy(demand) if demand != "off" else None
    (entry,) = read_catalog(AdapterRegistry(place, trust=asked), [], made[0].identity)
    assert (entry.signature, entry.refusal) == (signature, refusal)


def test_whose_key_may_not_sign_there(made, tmp_path):
    place = tmp_path / "signed"
    folder = altered(made[1]["first"], tmp_path / "mine", name="mine", namespace="medical")
    AdapterRegistry(place, signer=key("bob")).publish(folder)
    (entry,) = read_catalog(AdapterRegistry(place, trust=policy()), [], made[0].identity)
    assert entry.signature.startswith("signed with the key of 'bob', which may not sign in the namespace 'medical'")
    assert entry.refusal.startswith("the trust policy does not accept it: it is signed with the key of 'bob'")


@pytest.mark.parametrize("metrics", [None, 0.7, [], {"test": 0.7}, {"test": {"exact_match": "high"}}])
def test_metrics_of_another_type_are_no_score(metrics):
    entry = CatalogEntry(
        ref="a/b@1", name="a/b", version=1, aliases=(), summary={"metrics": metrics}, signature="", refusal=None
    )
    assert entry.values == {} and entry.metrics == []

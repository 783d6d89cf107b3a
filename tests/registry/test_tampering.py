"""Attacks on a signed log by an attacker who controls the store; reactions of readers, writers and ``verify``."""

import re
import shutil
import warnings
from pathlib import Path

import pytest

from finetune.adapters.manifest import canonical_json
from finetune.errors import IntegrityError, RegistryError, TrustError
from finetune.registry import AdapterRegistry, verify
from finetune.registry.log import commits
from finetune.registry.log.commits import Commit, Gate
from tests.registry.signed import (
    NAME,
    change,
    entry_path,
    key,
    policy,
    read_entry,
    rechain,
    signed_by,
    unsigned,
    write_entry,
)

pytestmark = pytest.mark.usefixtures("no_sync")


def open_as(location, trust=None, signer=None) -> AdapterRegistry:
    return AdapterRegistry(location, trust=trust or policy(), signer=signer)


@pytest.fixture
def signed(registry, make_adapter) -> str:
    """The location of a registry in which alice published two versions and moved an alias; no reader read it yet."""
    alice = AdapterRegistry(registry.location, signer=key("alice"))
    alice.publish(make_adapter(seed=1))
    alice.publish(make_adapter(seed=2))
    alice.alias(NAME, "prod", 1)
    return registry.location


def test_what_is_signed_is_accepted(signed):
    reader = open_as(signed)
    assert reader.resolve(f"{NAME}@prod").version == 1
    assert reader.resolve(NAME).version == 2
    assert (reader.pull(NAME) / "manifest.sig").is_file()
    report = verify(reader)
    assert report.problems == [] and report.signed_by == {"alice": 3}


# Attacks on the newest entry, or on all of it; what is refused, whatever is asked for.


def flip(signature: str, place: int = 90) -> str:
    return signature[:place] + ("A" if signature[place] != "A" else "B") + signature[place + 1 :]


def a_byte_of_the_signature(location):
    change(location, 3, signature=flip(read_entry(location, 3).signature))


def the_alias(location):
    change(location, 3, aliases={"latest": 2, "prod": 2})


def unsigned_head(location):
    change(location, 3, signature=None)


def stripped_and_rechained(location):
    rechain(location, unsigned)


def an_older_schema(location):
    fields = read_entry(location, 3).model_dump(exclude={"gate", "signature", "manifest_signature"})
    fields["schema_version"] = 2
    entry_path(location, 3).write_bytes(canonical_json(fields))


def signed_by_a_stranger(location):
    rechain(location, signed_by("mallory"))


def signed_by_who_may_sign_elsewhere(location):
    rechain(location, signed_by("bob"))


def signed_for_another_name(location):
    rechain(location, signed_by("alice", "medical/chest-xray"))


def signed_for_another_namespace(location):
    rechain(location, signed_by("alice", "retail/brain-mri"))


FORGED = (
    "its signature names the key of 'alice', which did not sign these bytes: they were changed "
    "after the signing, or signed for"
)
ATTACKS = {
    a_byte_of_the_signature: FORGED,
    the_alias: FORGED,
    unsigned_head: r"entry 3 of its log \(alias\): it is not signed",
    stripped_and_rechained: r"entry 3 of its log \(alias\): it is not signed",
    an_older_schema: r"entry 3 of its log \(alias\): it is not signed",
    signed_by_a_stranger: "it is signed with the unknown key [0-9a-f]{16}..., which is not among the keys of the",
    signed_by_who_may_sign_elsewhere: "signed with the key of 'bob', which may not sign in the namespace "
    "'medical' .*may: alice",
    signed_for_another_name: FORGED,
    signed_for_another_namespace: FORGED,
}
attacks = pytest.mark.parametrize(("attack", "message"), ATTACKS.items(), ids=lambda a: getattr(a, "__name__", ""))


@attacks
def test_a_reader_refuses_it(signed, attack, message):
    attack(signed)
    for ref in (NAME, f"{NAME}@prod", f"{NAME}@1"):
        with pytest.raises(TrustError, match=f"{NAME}: .*{message}.*the trust policy accepts: alice"):
            open_as(signed).resolve(ref)
    with pytest.raises(TrustError, match=message):
        open_as(signed).pull(NAME)


@attacks
def test_a_writer_builds_nothing_upon_it(signed, make_adapter, attack, message):
    attack(signed)
    writer = open_as(signed, signer=key("alice"))
    for write in (
        lambda: writer.publish(make_adapter(seed=3)),
        lambda: writer.alias(NAME, "prod", 2),
        lambda: writer.rollback(NAME, "prod", 2),
        lambda: writer.yank(f"{NAME}@1"),
    ):
        with pytest.raises(TrustError, match=message):
            write()
    assert not entry_path(signed, 4).exists()


@attacks
def test_verify_names_it(signed, attack, message):
    attack(signed)
    message = message.partition(": ")[2] if message.startswith("entry") else message
    problems = verify(open_as(signed)).problems
    assert re.search(f"000000000003.json: .*{message}", "\n".join(problems)), problems


@attacks
def test_where_the_namespace_only_warns_it_warns_once(signed, attack, message):
    attack(signed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_as(signed, policy("warn")).resolve(f"{NAME}@prod")
        (warning,) = caught
        open_as(signed, policy("warn")).pull(f"{NAME}@prod")
        assert [str(w.message) for w in caught] == [str(warning.message)] * 2
    with pytest.warns(UserWarning, match=message):
        open_as(signed, policy("warn")).resolve(f"{NAME}@prod")


@attacks
def test_where_signatures_are_off_nothing_is_logged(signed, attack, message):
    attack(signed)
    assert open_as(signed, policy("off")).pull(f"{NAME}@prod").is_dir()
    with pytest.raises(TrustError, match=message):
        open_as(signed).resolve(NAME)


def test_no_field_of_an_entry_can_be_changed(signed, make_adapter):
    other = "0" * 64
    changes = {
        "prev": other,
        "txn": "0" * 32,
        "op": "rollback",
        "version": 3,
        "manifest": other,
        "aliases": {"latest": 2},
        "yanked": {"1": "x"},
        "summary": {},
        "expect": {"prod": 1},
        "actor": "root@here",
        "time": "2031-01-01T00:00:00Z",
        "gate": Gate(required=["test.n>=1"], forced=[]),
    }
    assert {*changes, "seq", "schema_version", "signature", "manifest_signature"} == {*Commit.model_fields}
    good = read_entry(signed, 3)
    for field, value in changes.items():
        assert getattr(good, field) != value
        more = {"aliases": {"latest": 3}} if field == "version" else {}
        write_entry(signed, good.model_copy(update={field: value} | more))
        with pytest.raises(TrustError, match=FORGED):
            open_as(signed).resolve(NAME)
    write_entry(signed, good)
    assert open_as(signed).resolve(NAME).version == 2


def test_a_signature_has_one_spelling(signed):
    head = read_entry(signed, 3)
    good = head.signature
    last = good[-3]  # before "==": two of its six bits count
    other = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    same_bytes = other[other.index(last) ^ 1]
    for spelled in (
        f"{good[:-3]}{same_bytes}==",
        good.upper(),
        f"{good}\n",
        f" {good}",
        good[:-2],
        good.replace(":", ""),
    ):
        raw = canonical_json(head.model_dump() | {"signature": spelled})
        entry_path(signed, 3).write_bytes(raw)
        with pytest.raises(
            IntegrityError,
            match="not a valid log entry: signature: .*must (be the canonical base64|have the form ed25519:)",
        ):
            open_as(signed).resolve(NAME)


def test_only_a_publish_has_the_signature_of_a_manifest(signed):
    change(signed, 3, manifest_signature=read_entry(signed, 2).manifest_signature)
    with pytest.raises(
        IntegrityError,
        match="not a valid log entry: .*manifest_signature: must stand in an entry of the op publish, got alias",
    ):
        open_as(signed).resolve(NAME)


def test_an_entry_that_its_signature_makes_too_long_is_not_written(signed, monkeypatch):
    fits = unsigned(read_entry(signed, 3))
    monkeypatch.setattr(commits, "MAX_COMMIT_BYTES", len(fits.to_bytes()) + 40)
    with pytest.raises(RegistryError, match="cannot write this entry to the log: the new entry must have at most"):
        signed_by("alice")(fits.checked())


def test_verify_names_what_is_forged_whatever_is_asked_for(signed):
    the_alias(signed)
    report = verify(open_as(signed, policy("off")))
    (problem,) = report.problems
    assert re.search(f"000000000003.json: {FORGED}", problem)
    assert report.signed_by == {"alice": 2, "not alice, whose key the signature names": 1}
    unsigned_head(signed)
    assert verify(open_as(signed, policy("off"))).problems == []


def test_an_entry_in_the_place_of_another(signed):
    shutil.copy(entry_path(signed, 2), entry_path(signed, 3))
    with pytest.raises(IntegrityError, match="000000000003.json: its `seq` must be 3, got 2"):
        open_as(signed).resolve(NAME)


def test_a_log_under_another_name(signed):
    root = Path(signed, "names", "medical")
    shutil.copytree(root / "brain-mri", root / "chest-xray")
    with pytest.raises(TrustError, match=f"medical/chest-xray: entry 3 .*{FORGED} another name"):
        open_as(signed).resolve("medical/chest-xray")


# Attacks on an older entry, behind a newest one that is as it should be.


def _behind(field, value):
    def attack(location):
        change(location, 1, **{field: value})

    return attack


def _other_manifest(location):
    change(location, 1, manifest=read_entry(location, 2).manifest)


def _others_manifest_signature(location):
    change(location, 1, manifest_signature=read_entry(location, 2).manifest_signature)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (_other_manifest, rf"entry 1 of its log \(publish\): {FORGED}"),
        (_others_manifest_signature, rf"entry 1 of its log \(publish\): {FORGED}"),
        (_behind("signature", None), r"entry 1 of its log \(publish\): it is not signed"),
        (_behind("manifest_signature", None), rf"entry 1 of its log \(publish\): {FORGED}"),
    ],
)
def test_the_entry_that_published_a_version_is_looked_at(signed, attack, message):
    attack(signed)
    for ref in (f"{NAME}@1", f"{NAME}@prod"):
        with pytest.raises(TrustError, match=message):
            open_as(signed).resolve(ref)
    assert open_as(signed).resolve(NAME).version == 2
    assert verify(open_as(signed)).problems


def test_an_unsigned_manifest_is_refused_in_a_signed_entry(registry, make_adapter):
    AdapterRegistry(registry.location).publish(make_adapter())
    entry = read_entry(registry.location, 1)
    namespace, name = NAME.split("/")
    signature = key("alice").sign(entry.message(namespace, name))
    write_entry(registry.location, entry.model_copy(update={"signature": signature}))
    with pytest.raises(TrustError, match=r"the manifest sha256:[0-9a-f]{64}: it is not signed"):
        open_as(registry.location).resolve(NAME)
    (problem,) = verify(open_as(registry.location)).problems
    assert problem.endswith("000000000001.json: its manifest: it is not signed")


def test_a_listing_checks_nothing_but_what_it_gave_is_not_pulled(signed):
    stripped_and_rechained(signed)
    reader = open_as(signed)
    (version,) = reader.list()
    assert (version.ref, version.signature) == (f"{NAME}@2", None)
    with pytest.raises(TrustError, match=r"the manifest sha256:[0-9a-f]{64}: it is not signed"):
        reader.pull(version)


def test_a_rollback_uses_what_the_newest_entry_signs(signed):
    """The version that an alias stood for before is read from the history, of which only the newest is signed for."""
    alice = open_as(signed, signer=key("alice"))
    alice.alias(NAME, "prod", 2)
    change(signed, 3, aliases={"latest": 2, "prod": 2})
    with pytest.raises(
        IntegrityError, match="000000000004.json: its `prev` must be the digest of the entry before it, and is not"
    ):
        alice.rollback(NAME, "prod")
    assert not entry_path(signed, 5).exists()

"""The trust policy: the file, and who may write what."""

import os

import pytest

from finetune.errors import StoreError, TrustError
from finetune.registry import AdapterRegistry, verify
from finetune.registry.trust.policy import PolicyFile, TrustPolicy, default_policy_path, load_policy
from tests.registry.signed import NAME, entry_path, key, policy

pytestmark = pytest.mark.usefixtures("no_sync")

ALICE, BOB = (key(name).public(name).line for name in ("alice", "bob"))
GOOD = f"""\
keys:
  - {ALICE}
  - {BOB}
namespaces:
  medical: {{signatures: require, keys: [alice]}}
  retail: {{signatures: warn, keys: [alice, bob]}}
default: {{signatures: off}}
revoked:
  bob: left the team
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trust.yaml"
    path.write_text(GOOD)
    return path


def test_a_policy(file):
    read = load_policy(file)
    assert [read.of(name).signatures for name in ("medical", "retail", "robots")] == ["require", "warn", "off"]
    assert read.of("retail").keys == ["alice", "bob"]
    assert read.verify_signature("medical", None, b"x").problem == "it is not signed"
    alice = read.verify_signature("medical", key("alice").sign(b"x"), b"x")
    assert (alice.signer, alice.problem, alice.forged) == ("alice", None, False)
    bob = read.verify_signature("retail", key("bob").sign(b"x"), b"x")
    assert (bob.signer, bob.problem) == ("bob", "it is signed with the key of 'bob', which is revoked: left the team")
    forged = read.verify_signature("medical", key("alice").sign(b"y"), b"x")
    assert forged.forged and forged.signer == "not alice, whose key the signature names"
    stranger = read.verify_signature("medical", key("mallory").sign(b"x"), b"x")
    assert stranger.signer == f"unknown key {key('mallory').id[:16]}..." and not stranger.forged
    assert TrustPolicy().of("medical").signatures == "off"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "require",
            "required",
            "namespaces.medical.signatures: Input should be 'require', 'warn' or 'off'. Got 'required'",
        ),
        (
            "keys: [alice]}",
            "key: [alice]}",
            "namespaces.medical.key: unknown key. Did you mean 'keys'. Allowed here: sig",
        ),
        (
            "revoked",
            "revokd",
            "trust.yaml: revokd: unknown key. Did you mean 'revoked'. Allowed here: keys, namespaces",
        ),
        (
            "keys: [alice]}",
            "keys: [alise]}",
            "namespaces.medical.keys: must name keys of the policy, got 'alise'. Did you mean 'alice'",
        ),
        (
            "[alice, bob]",
            "[alice, eve]",
            r"namespaces.retail.keys: must name keys of the policy, got 'eve'. Keys: alice, bob",
        ),
        ("  bob: left", "  carol: left", "revoked: must name keys of the policy, got 'carol'"),
        (
            ", keys: [alice]}",
            "}",
            "namespaces.medical: keys: must name at least one key with `signatures: require`, got none",
        ),
        (
            BOB,
            f"{BOB.rsplit(' ', 1)[0]} alice",
            "keys: a name must be unique, but 'alice' is given twice",
        ),
        (
            BOB,
            f"{ALICE.rsplit(' ', 1)[0]} bob",
            "keys: a key must be unique, but that of 'bob' is given twice",
        ),
        (
            BOB,
            "ssh-ed25519 AAAA bob",
            "a public key must be finetune.*got 'ssh-ed25519 AAAA bob': it does not have that form",
        ),
        ("medical:", "Medical*:", "namespaces.Medical.*: String should match pattern"),
        ("  retail:", "  medical:", "must be valid YAML: line 6: a key must be unique, but 'medical' is given twice"),
        ("keys:", "keys: [", "must be valid YAML"),
        (": left the team", ": ''", "revoked.bob: String should have at least 1 character"),
    ],
    ids=lambda text: "a key" if text in (ALICE, BOB) or text.startswith("finetune-ed25519") else None,
)
def test_a_policy_with_unknown_content_is_refused_whole(file, old, new, message):
    file.write_text(GOOD.replace(old, new, 1))
    assert file.read_text() != GOOD
    with pytest.raises(TrustError, match=f"trust.yaml: .*{message}" if "trust.yaml" not in message else message):
        load_policy(file)


def test_a_file_that_is_none(file, tmp_path):
    for content in ("", "- 1", "require"):
        file.write_text(content)
        with pytest.raises(
            TrustError, match="a trust policy must be a mapping with the keys keys, namespaces, default, revok"
        ):
            load_policy(file)
    with pytest.raises(TrustError, match=r"none.yaml: there is no such trust policy \(FINETUNE_TRUST\)"):
        load_policy(tmp_path / "none.yaml")
    with pytest.raises(StoreError, match="cannot read .*: Is a directory"):
        load_policy(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StoreError, match="cannot read .*fifo: it is a FIFO, not a regular file. Remove it"):
        load_policy(tmp_path / "fifo")


# Which policy holds.


@pytest.fixture
def unsigned(registry, make_adapter) -> str:
    """The location of a registry with an unsigned version."""
    AdapterRegistry(registry.location).publish(make_adapter())
    return registry.location


def test_the_policy_of_the_user(unsigned, monkeypatch, tmp_path, file):
    assert AdapterRegistry(unsigned).resolve(NAME).version == 1, "without a policy no signature is asked for"
    assert default_policy_path() == tmp_path / "home" / ".finetune" / "trust.yaml"
    default_policy_path().parent.mkdir(parents=True, exist_ok=True)
    default_policy_path().write_text(GOOD)
    with pytest.raises(TrustError, match=f"the trust policy {default_policy_path()} accepts: alice"):
        AdapterRegistry(unsigned).resolve(NAME)
    file.write_text("default: {signatures: off}")
    monkeypatch.setenv("FINETUNE_TRUST", str(file))
    assert AdapterRegistry(unsigned).resolve(NAME).version == 1
    monkeypatch.setenv("FINETUNE_TRUST", str(tmp_path / "none.yaml"))
    with pytest.raises(TrustError, match="there is no such trust policy"):
        AdapterRegistry(unsigned).resolve(NAME)
    assert AdapterRegistry(unsigned, trust=file).resolve(NAME).version == 1
    assert AdapterRegistry(unsigned, trust=str(file)).resolve(NAME).version == 1


def test_a_policy_that_is_there_and_cannot_be_read_is_not_none(unsigned, monkeypatch, tmp_path):
    path = default_policy_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(tmp_path / "unmounted" / "trust.yaml", path)
    with pytest.raises(TrustError, match="there is no such trust policy"):
        AdapterRegistry(unsigned).resolve(NAME)
    path.unlink()

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("finetune.registry.trust.policy.file_key", refuse)
    path.write_text(GOOD)
    with pytest.raises(TrustError, match="it is not signed"):
        AdapterRegistry(unsigned).resolve(NAME)


def test_a_change_of_the_policy_holds_at_once_and_its_loss_is_an_error(unsigned, file):
    file.write_text("default: {signatures: off}")
    for optional in (False, True):
        registry = AdapterRegistry(unsigned, trust=file)
        registry.guard._trust = PolicyFile(file, optional=optional)
        assert registry.resolve(NAME).version == 1
        file.write_text(GOOD)
        with pytest.raises(TrustError, match="it is not signed"):
            registry.resolve(NAME)
        file.unlink()
        with pytest.raises(TrustError, match="there is no such trust policy"):
            registry.resolve(NAME)
        file.write_text("default: {signatures: off}")
        assert registry.resolve(NAME).version == 1


def test_the_default_is_for_every_other_namespace(unsigned):
    strict = TrustPolicy.model_validate({"keys": [ALICE], "default": {"signatures": "require", "keys": ["alice"]}})
    with pytest.raises(TrustError, match="In the namespace 'medical' the trust policy accepts: alice"):
        AdapterRegistry(unsigned, trust=strict).resolve(NAME)


# Who writes.


def test_nothing_is_written_unsigned_where_signatures_are_required(registry, make_adapter):
    writer = AdapterRegistry(registry.location, trust=policy())
    with pytest.raises(
        TrustError,
        match="the trust policy requires signatures in the namespace 'medical', and there is no key to sign with. Give "
        "the file of a key with --sign-with or FINETUNE_SIGNING_KEY. Nothing was written",
    ):
        writer.publish(make_adapter(seed=1))
    assert not os.path.exists(registry.location)
    AdapterRegistry(registry.location, trust=policy(), signer=key("alice")).publish(make_adapter(seed=2))
    for write in (
        lambda: writer.alias(NAME, "prod", 1),
        lambda: writer.rollback(NAME, "latest-good", 1),
        lambda: writer.yank(f"{NAME}@1"),
    ):
        with pytest.raises((TrustError, LookupError), match="no key to sign with|has no alias"):
            write()
    assert not entry_path(registry.location, 2).exists()


@pytest.mark.parametrize(
    ("who", "trust", "message"),
    [
        (
            "mallory",
            policy(),
            "in the namespace 'medical', got the unknown key [0-9a-f]{16}..., which is not among the keys of",
        ),
        ("bob", policy(), "got the key of 'bob', which may not sign in the namespace 'medical'"),
        (
            "alice",
            policy(keys=("alice", "carol"), revoked=("alice",)),
            "got the key of 'alice', which is revoked: stolen",
        ),
    ],
)
def test_nothing_is_written_with_a_key_that_would_not_be_accepted(registry, make_adapter, who, trust, message):
    writer = AdapterRegistry(registry.location, trust=trust, signer=key(who))
    with pytest.raises(
        TrustError, match=f"signing key must be one that the trust policy accepts .*{message}.*Nothing was written"
    ):
        writer.publish(make_adapter())
    assert not os.path.exists(registry.location)


def test_where_a_policy_only_warns_anybody_writes(registry, make_adapter):
    writer = AdapterRegistry(registry.location, trust=policy("warn"))
    writer.publish(make_adapter(seed=1))
    with pytest.warns(UserWarning, match="entry 1 .*: it is not signed"):
        writer.alias(NAME, "prod", 1)


# Keys come and go.


def test_a_second_key_takes_over(registry, make_adapter):
    """No key was stolen: both stay in the policy, and everything that alice signed stays valid."""
    both = policy(keys=("alice", "carol"))
    AdapterRegistry(registry.location, trust=policy(), signer=key("alice")).publish(make_adapter(), aliases=["prod"])
    carol = AdapterRegistry(registry.location, trust=both, signer=key("carol"))
    carol.publish(make_adapter(seed=1))
    assert carol.resolve(f"{NAME}@prod").version == 1
    report = verify(carol)
    assert report.problems == [] and report.signed_by == {"alice": 1, "carol": 1}


def test_after_a_key_is_stolen(registry, make_adapter, tmp_path):
    """What it signed is refused; what is looked at, and found good, is published again with the new key."""
    alice = AdapterRegistry(registry.location, trust=policy(), signer=key("alice"))
    first = alice.publish(make_adapter(seed=1), aliases=["prod"])
    alice.publish(make_adapter(seed=2))
    now = policy(keys=("alice", "carol"), revoked=("alice",))
    reader = AdapterRegistry(registry.location, trust=now)
    stolen = "entry 2 of its log .publish.: it is signed with the key of 'alice', which is revoked: stolen"
    with pytest.raises(TrustError, match=stolen):
        reader.resolve(f"{NAME}@prod")
    meanwhile = policy("warn", keys=("alice", "carol"), revoked=("alice",))
    repair = AdapterRegistry(registry.location, trust=meanwhile, signer=key("carol"))
    with pytest.warns(UserWarning, match=stolen):
        good = repair.pull(f"{NAME}@1", tmp_path / "good")
    with pytest.warns(UserWarning, match=stolen):
        repair.publish(good, aliases=["prod"])
    problems = verify(reader).problems
    assert [problem.partition(": ")[0] for problem in problems] == [
        f"names/{NAME}/log/00000000000{n}.json" for n in (1, 2)
    ]
    assert all("it is signed with the key of 'alice', which is revoked: stolen" in problem for problem in problems)
    for number in (1, 2):
        repair.yank(f"{NAME}@{number}", reason="signed with a stolen key")
    assert reader.resolve(f"{NAME}@prod").version == 3
    assert reader.resolve(f"{NAME}@prod").digest == first.digest
    with pytest.raises(TrustError, match="entry 2 of its log .publish.: .* revoked"):
        reader.resolve(f"{NAME}@2")
    report = verify(reader)
    assert report.problems == [], "history, which the digests in later entries protect"
    assert report.signed_by == {"alice": 2, "carol": 3}

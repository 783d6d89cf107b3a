"""Yank: a withdrawn version stays, is shown as yanked, and no alias resolves to it."""

from pathlib import Path

import pytest

from finetune.adapters.manifest import canonical_json
from finetune.errors import AdapterReferenceError, IntegrityError, NotFoundError, RegistryError, YankedError
from finetune.registry import AdapterRegistry, verify
from finetune.registry.log.commits import Commit
from finetune.registry.log.links import check_link
from tests.registry.faulty import Interfering
from tests.registry.folders import same

pytestmark = pytest.mark.usefixtures("no_sync")

NAME = "medical/brain-mri"


@pytest.fixture
def three(registry, make_adapter) -> AdapterRegistry:
    """Three versions; prod points to the second."""
    for seed in range(3):
        registry.publish(make_adapter(seed=seed))
    registry.alias(NAME, "prod", 2)
    return registry


def test_latest_falls_to_the_newest_that_is_not_yanked(three):
    yanked = three.yank(f"{NAME}@3", reason="trained on the test rows")
    assert (yanked.version, yanked.yanked, yanked.aliases) == (3, "trained on the test rows", ())
    assert three.resolve(NAME).ref == f"{NAME}@2"
    assert three.resolve(f"{NAME}@latest").aliases == ("latest", "prod")
    three.yank(f"{NAME}@2")
    assert three.resolve(NAME).version == 1
    three.unyank(f"{NAME}@3")
    assert three.resolve(NAME).version == 3
    assert [(c.op, c.aliases["latest"], c.yanked) for c in three.log(NAME)[4:]] == [
        ("yank", 2, {"3": "trained on the test rows"}),
        ("yank", 1, {"3": "trained on the test rows", "2": "no reason was given"}),
        ("unyank", 3, {"2": "no reason was given"}),
    ]
    assert verify(three).problems == []


def test_an_alias_at_a_yanked_version_is_an_error(three):
    three.yank(f"{NAME}@2", reason="wrong rows")
    message = "@prod points to version 2, which is yanked: wrong rows. Move the alias .* medical/brain-mri prod VERSION"
    for call in (three.resolve, three.pull):
        with pytest.raises(YankedError, match=message):
            call(f"{NAME}@prod")
    three.alias(NAME, "prod", 1)
    assert three.resolve(f"{NAME}@prod").version == 1
    with pytest.raises(YankedError, match="brain-mri@2 is yanked: wrong rows. Choose another version for 'test'"):
        three.alias(NAME, "test", 2)


def test_an_exact_version_is_given_with_a_warning(three, make_adapter):
    assert three.resolve(f"{NAME}@2").warning is None
    digest = three.yank(f"{NAME}@2", reason="wrong rows").digest
    for ref in (f"{NAME}@2", f"{NAME}@sha256:{digest}"):
        version = three.resolve(ref)
        assert version.warning == f"{NAME}@2 is yanked: wrong rows. Use another version."
        assert same(three.pull(ref), three.pull(version))


def test_when_all_are_yanked_there_is_no_latest(three, make_adapter):
    for version in (1, 2, 3):
        three.yank(f"{NAME}@{version}", reason="recalled")
    with pytest.raises(
        YankedError,
        match=f"every version of {NAME} is yanked. The reason for the newest, version 3: recalled. Publish another",
    ):
        three.resolve(NAME)
    assert [(v.ref, v.yanked) for v in three.list()] == [(f"{NAME}@3", "recalled")]
    assert three.publish(make_adapter(seed=9)).version == 4
    assert three.resolve(NAME).version == 4
    assert verify(three).problems == []


def test_publish_after_a_yank_is_the_latest(three, make_adapter):
    three.yank(f"{NAME}@3")
    assert three.publish(make_adapter(seed=9), aliases=["prod"]).aliases == ("latest", "prod")
    assert three.resolve(f"{NAME}@3").yanked == "no reason was given"


def test_what_is_yanked_twice_is_written_once(three):
    first = three.yank(f"{NAME}@1", reason="old")
    entries = len(three.log(NAME))
    assert three.yank(f"{NAME}@1") == three.yank(f"{NAME}@1", reason="old") == first
    assert len(three.log(NAME)) == entries
    assert three.yank(f"{NAME}@1", reason="older").yanked == "older"
    assert three.unyank(f"{NAME}@1").yanked is None
    entries = len(three.log(NAME))
    assert three.unyank(f"{NAME}@1").yanked is None
    assert len(three.log(NAME)) == entries
    assert verify(three).problems == []


def test_list_shows_it(three, make_adapter):
    three.publish(make_adapter("retail/shoes"))
    three.yank(f"{NAME}@3", reason="wrong rows")
    assert [(v.ref, v.yanked) for v in three.list()] == [(f"{NAME}@2", None), ("retail/shoes@1", None)]
    assert [(v.ref, v.yanked) for v in three.list("medical", all_versions=True)] == [
        (f"{NAME}@1", None),
        (f"{NAME}@2", None),
        (f"{NAME}@3", "wrong rows"),
    ]


@pytest.mark.parametrize("ref", [NAME, f"{NAME}@prod", f"{NAME}@sha256:{'0' * 64}"])
def test_the_version_is_named_by_its_number(three, ref):
    for call in (three.yank, three.unyank):
        with pytest.raises(AdapterReferenceError, match="needs the number of a version, such as .*@17, got "):
            call(ref)


def test_what_cannot_be_yanked(three, tmp_path):
    with pytest.raises(NotFoundError, match="@4 does not exist. medical/brain-mri has versions 1 to 3"):
        three.yank(f"{NAME}@4")
    with pytest.raises(NotFoundError, match="there is no registry at"):
        AdapterRegistry(tmp_path / "nowhere").yank(f"{NAME}@1")
    for reason in ("", "two\nlines", "\x1b[2J", "x" * 257):
        with pytest.raises(RegistryError, match="cannot write this entry to the log: yanked.1: String should match"):
            three.yank(f"{NAME}@1", reason=reason)
    assert len(three.log(NAME)) == 4


def test_a_yank_that_was_second_keeps_what_the_first_did(three):
    other, races = AdapterRegistry(three.location), iter([1])

    def race(verb, key):
        if verb == "put" and next(races, None):
            other.yank(f"{NAME}@1", reason="theirs")

    mine = AdapterRegistry(three.location)
    mine.store = Interfering(mine.store, before=race)
    mine.yank(f"{NAME}@3", reason="mine")
    assert three.log(NAME)[-1].yanked == {"1": "theirs", "3": "mine"}


# Entries.


def _chain(**changes):
    first = Commit.after(
        None, op="publish", txn="0" * 32, version=1, manifest="1" * 64, aliases={"prod": 1}, summary={}
    )
    second = Commit.after(first, op="publish", txn="0" * 32, version=2, manifest="1" * 64)
    return second, Commit.after(second, **{"op": "yank", "txn": "0" * 32, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"yanked": {"2": "x"}}, None),
        ({"yanked": {"2": "x"}, "op": "unyank"}, "its op is unyank, which must not change yanked versions: 2"),
        ({"yanked": {"2": "x", "1": "x"}}, "its op is yank, which must not change yanked versions: 1, 2"),
        ({"yanked": {"2": "x"}, "op": "alias"}, "its op is alias, which must not change yanked versions: 2"),
        ({"yanked": {"2": "x"}, "op": "rollback"}, "its op is rollback, which must not change yanked versions: 2"),
        ({"yanked": {"2": "x"}, "aliases": {"prod": 2}}, "its op is yank, which must not change aliases: prod"),
        ({"aliases": {"prod": 2}, "op": "rollback"}, None),
        (
            {"aliases": {"prod": 2, "test": 2}, "op": "alias"},
            "its op is alias, which must not change aliases: prod, test",
        ),
        ({"aliases": {}, "op": "rollback"}, "its op is rollback, which must not change aliases: prod"),
        (
            {"aliases": {"prod": 1, "test": 1}, "op": "publish", "version": 3},
            "its op is publish, which must not change aliases: test",
        ),
    ],
)
def test_an_entry_changes_what_its_op_names(changes, problem):
    second, third = _chain(**changes)
    assert check_link(third, second) == ([problem] if problem else [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"yanked": {"2": "x"}}, "yanked: must name versions up to the newest, 1, got 2"),
        ({"yanked": {"0": "x"}}, "yanked.0.*: String should match"),
        ({"yanked": {"1": ""}}, "yanked.1: String should match"),
        ({"aliases": {"latest": 1}, "version": 2}, "aliases.latest: must be 2, got 1"),
        (
            {"schema_version": 1, "yanked": {"1": "x"}},
            "schema 1 must be a publish or an alias, without yanked versions",
        ),
        (
            {"schema_version": 1, "op": "rollback"},
            "must be a publish or an alias, without yanked versions, got the op rollback",
        ),
        (
            {"gate": {"required": ["test.n>=1"], "forced": []}},
            "gate: must stand in an entry of the op alias and schema 3, got publish and 3",
        ),
        ({"gate": {"required": [], "forced": []}}, "gate.required: List should have at least 1 item"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(fields, message):
    good = Commit.after(None, op="publish", txn="0" * 32, version=1, manifest="1" * 64, aliases={}, summary={})
    raw = canonical_json(good.model_dump() | fields)
    with pytest.raises(IntegrityError, match=f"not a valid log entry: .*{message}"):
        Commit.parse(raw, source="entry")


SINCE_3 = {"gate", "manifest_signature", "signature"}


@pytest.mark.parametrize(("schema", "unknown"), [(1, {"yanked", *SINCE_3}), (2, SINCE_3)])
def test_a_registry_begun_with_an_older_schema_goes_on(three, make_adapter, schema, unknown):
    """Its entries say nothing of what came later, and the chain is over these very bytes."""
    log = Path(three.location, "names", NAME, "log")
    previous = None
    for path in sorted(log.iterdir()):
        fields = Commit.parse(path.read_bytes(), source=path.name).model_dump(exclude=unknown)
        old = canonical_json(fields | {"schema_version": schema, "prev": previous})
        path.write_bytes(old)
        previous = Commit.parse(old, source=path.name).digest
    begun = AdapterRegistry(three.location)
    assert verify(begun).problems == []
    assert begun.resolve(f"{NAME}@prod").version == 2
    begun.yank(f"{NAME}@3")
    begun.publish(make_adapter(seed=9))
    assert [c.schema_version for c in begun.log(NAME)] == [schema] * 4 + [3, 3]
    assert verify(begun).problems == []

"""Aliases: moved, moved back, and expected to be where they are."""

import pytest

from finetune.errors import AdapterReferenceError, ConflictError, NotFoundError, YankedError
from finetune.registry import AdapterRegistry, verify
from tests.registry.faulty import Interfering

pytestmark = pytest.mark.usefixtures("no_sync")


def test_expectations(registry, make_adapter):
    for seed in range(3):
        registry.publish(make_adapter(seed=seed))
    name = "medical/brain-mri"
    assert registry.alias(name, "prod", 1, expect=0).version == 1
    assert registry.alias(name, "prod", "latest", expect=1).version == 3
    message = "the alias 'prod' must point to version 1 .`expect`., but points to version 3 .entry 5, by "
    with pytest.raises(ConflictError, match=message):
        registry.alias(name, "prod", 2, expect=1)
    with pytest.raises(ConflictError, match="must point to no version .`expect`., but points to version 3"):
        registry.alias(name, "prod", 2, expect=0)
    with pytest.raises(ConflictError, match="'test' must point to version 3 .`expect`., but points to no version"):
        registry.alias(name, "test", 2, expect=3)
    assert registry.log(name)[-1].expect == {"prod": 1}
    assert len(registry.log(name)) == 5


def test_an_expectation_is_looked_at_again_after_a_lost_race(registry, make_adapter):
    for seed in range(3):
        registry.publish(make_adapter(seed=seed))
    other = AdapterRegistry(registry.location)
    races = iter([1])

    def race(verb, key):
        if verb == "put" and next(races, None):
            other.alias("medical/brain-mri", "prod", 2)

    registry = AdapterRegistry(registry.location)
    registry.store = Interfering(registry.store, before=race)
    with pytest.raises(ConflictError, match="must point to no version .`expect`., but points to version 2"):
        registry.alias("medical/brain-mri", "prod", 1, expect=0)
    assert registry.resolve("medical/brain-mri@prod").version == 2


def test_alias_targets(registry, make_adapter):
    for seed in range(2):
        version = registry.publish(make_adapter(seed=seed))
    name = "medical/brain-mri"
    for target, number in ((1, 1), ("2", 2), ("latest", 2), (f"sha256:{version.digest}", 2)):
        assert registry.alias(name, "prod", target).version == number
    entries = len(registry.log(name))
    assert registry.alias(name, "prod", 2).aliases == ("latest", "prod")
    assert len(registry.log(name)) == entries
    with pytest.raises(
        NotFoundError, match="medical/brain-mri@9 does not exist. medical/brain-mri has versions 1 to 2"
    ):
        registry.alias(name, "prod", 9)
    with pytest.raises(NotFoundError, match=r"@prox does not exist. Did you mean 'prod'\?"):
        registry.alias(name, "new", "prox")
    with pytest.raises(
        AdapterReferenceError,
        match="`alias` must not be 'latest', which always points to the newest version that is not yanked",
    ):
        registry.alias(name, "latest", 1)
    with pytest.raises(AdapterReferenceError, match="is not an adapter reference"):
        registry.alias(name, "prod", -1)
    with pytest.raises(AdapterReferenceError, match="must have the form ns/name, without a version"):
        registry.alias(f"{name}@1", "prod", 1)


# Rollback.


NAME = "medical/brain-mri"


@pytest.fixture
def moved(registry, make_adapter) -> AdapterRegistry:
    """Four versions; prod stood for 1, 2, 4."""
    for seed in range(4):
        registry.publish(make_adapter(seed=seed))
    for version in (1, 2, 4):
        registry.alias(NAME, "prod", version)
    return registry


def test_rollback_undoes_moves_one_by_one(moved):
    assert moved.rollback(NAME, "prod").ref == f"{NAME}@2"
    assert moved.resolve(f"{NAME}@prod").version == 2
    assert moved.rollback(NAME, "prod").version == 1
    with pytest.raises(NotFoundError, match="'prod' points to version 1, and never pointed to another version that"):
        moved.rollback(NAME, "prod")
    assert [(c.op, c.aliases["prod"]) for c in moved.log(NAME)[4:]] == [
        ("alias", 1),
        ("alias", 2),
        ("alias", 4),
        ("rollback", 2),
        ("rollback", 1),
    ]
    assert verify(moved).problems == []


def test_rollback_after_going_forward_again(moved):
    moved.rollback(NAME, "prod")
    moved.alias(NAME, "prod", 3)
    assert moved.rollback(NAME, "prod").version == 2
    moved.alias(NAME, "prod", 1)
    assert moved.rollback(NAME, "prod").version == 2, "where it was last, not the lowest number"


def test_rollback_to_a_given_version(moved):
    assert moved.rollback(NAME, "prod", 1).version == 1
    assert moved.rollback(NAME, "prod", to=3).version == 3, "also one that it never stood for"
    assert moved.rollback(NAME, "prod").version == 1
    entries = len(moved.log(NAME))
    assert moved.rollback(NAME, "prod", to=1).version == 1
    assert len(moved.log(NAME)) == entries, "it is there already"


def test_rollback_of_an_alias_that_publish_moved(registry, make_adapter):
    for seed in range(2):
        registry.publish(make_adapter(seed=seed), aliases=["prod"])
    assert registry.rollback(NAME, "prod").version == 1


def test_rollback_passes_over_what_is_yanked(moved):
    moved.yank(f"{NAME}@2", reason="wrong rows")
    assert moved.rollback(NAME, "prod").version == 1
    with pytest.raises(YankedError, match="brain-mri@2 is yanked: wrong rows. Choose another version for 'prod'"):
        moved.rollback(NAME, "prod", to=2)
    assert moved.resolve(f"{NAME}@prod").version == 1


def test_rollback_expects_the_given_version(moved):
    with pytest.raises(ConflictError, match="must point to version 1 .`expect`., but points to version 4"):
        moved.rollback(NAME, "prod", expect=1)
    assert moved.rollback(NAME, "prod", expect=4).version == 2
    assert moved.log(NAME)[-1].expect == {"prod": 4}


def test_rollback_of_what_is_not_there(moved, tmp_path):
    with pytest.raises(
        NotFoundError, match=r"has no alias 'prd'. Did you mean 'prod'\? It has the aliases latest \(4\), p"
    ):
        moved.rollback(NAME, "prd")
    with pytest.raises(NotFoundError, match="has no alias 'new'"):
        moved.rollback(NAME, "new", to=1)
    with pytest.raises(NotFoundError, match="@9 does not exist. medical/brain-mri has versions 1 to 4"):
        moved.rollback(NAME, "prod", to=9)
    with pytest.raises(AdapterReferenceError, match="`alias` must not be 'latest', which always points to"):
        moved.rollback(NAME, "latest")
    with pytest.raises(NotFoundError, match="no adapter 'medical/x'"):
        moved.rollback("medical/x", "prod")
    with pytest.raises(NotFoundError, match="there is no registry at"):
        AdapterRegistry(tmp_path / "nowhere").rollback(NAME, "prod")


def test_a_rollback_that_was_second_undoes_what_the_first_did(moved):
    """Where the alias was before is asked again of the newer log."""
    other, races = AdapterRegistry(moved.location), iter([1])

    def race(verb, key):
        if verb == "put" and next(races, None):
            other.alias(NAME, "prod", 3)

    mine = AdapterRegistry(moved.location)
    mine.store = Interfering(mine.store, before=race)
    assert mine.rollback(NAME, "prod").version == 4

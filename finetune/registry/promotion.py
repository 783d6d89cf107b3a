"""Promotion: it moves an alias to a version whose metrics meet conditions, and the log records the conditions."""

from collections.abc import Iterable

from finetune.adapters.reference import AdapterRef
from finetune.errors import PromotionError, RegistryError
from finetune.metrics.names import named_values
from finetune.registry.differences import read_manifest
from finetune.registry.log.commits import Gate
from finetune.registry.log.conditions import Condition
from finetune.registry.log.versions import Version
from finetune.registry.registry import AdapterRegistry


def promote(
    registry: AdapterRegistry,
    ref: str | AdapterRef,
    alias: str,
    *,
    require: Iterable[Condition | str],
    expect: int | None = None,
    force: bool = False,
) -> Version:
    """Move an alias to a version whose metrics meet the conditions, and record the conditions in the log.

    The metrics are those of the manifest, whose bytes are checked first. A missing metric meets no condition. When the
    alias points to the version already, nothing is written.

    Args:
        registry: the registry that holds the version.
        ref: the reference to the version.
        alias: the alias, such as ``prod``.
        require: the conditions that must hold, such as ``"test.METRIC>=0.70"``; see ``finetune.metrics.names``.
        expect: the version that the alias must point to now, 0 for no such alias; None for any.
        force: True to move the alias even if a condition does not hold; the log records the condition and the value.

    Returns:
        The version that the alias points to now.

    Raises:
        PromotionError: a condition does not hold; the message has the values. Nothing was changed.
        RegistryError: ``require`` is empty; or as for ``AdapterRegistry.alias``.
        IntegrityError: the manifest is damaged.
    """
    conditions = [Condition.parse(each) if isinstance(each, str) else each for each in require]
    if not conditions:
        raise RegistryError(
            f"`require` must hold at least one condition, got none (for {alias!r}). Give one, or move the alias "
            "without conditions with `alias`."
        )
    version = registry.resolve(ref)
    values = named_values(read_manifest(registry, version).metrics)
    unmet = [condition.describe(values) for condition in conditions if not condition.holds(values)]
    if unmet and not force:
        raise PromotionError(
            f"cannot promote {version.ref} to {alias}: {'; '.join(unmet)}. Nothing was changed. Use `force` to move "
            "the alias anyway; the log records that."
        )
    gate = Gate(required=[str(condition) for condition in conditions], forced=unmet)
    return registry.alias(version.full_name, alias, version.version, expect=expect, gate=gate)

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
    """Let an alias stand for a version when its metrics meet the conditions; its entry in the log keeps them.

    The metrics are those of the manifest, whose bytes are checked first. A metric that is not among them meets
    no condition. When the alias stands for the version already, nothing is written.

    Args:
        registry: the registry that holds it.
        ref: the version.
        alias: the alias, such as ``prod``.
        require: the conditions that must hold, such as ``"test.METRIC>=0.70"``; see ``finetune.metrics.names``.
        expect: the version that the alias must stand for now, 0 for none; None to move it from anywhere.
        force: whether to move it although a condition does not hold; the entry records the condition and the value.

    Returns:
        The version that the alias stands for now.

    Raises:
        PromotionError: conditions do not hold; the message has the values. Nothing was changed.
        RegistryError: there is no condition; or as for ``AdapterRegistry.alias``.
        IntegrityError: the manifest is damaged.
    """
    conditions = [Condition.parse(each) if isinstance(each, str) else each for each in require]
    if not conditions:
        raise RegistryError("nothing is required: give a condition, or move the alias without one by `alias`")
    version = registry.resolve(ref)
    values = named_values(read_manifest(registry, version).metrics)
    unmet = [condition.describe(values) for condition in conditions if not condition.holds(values)]
    if unmet and not force:
        raise PromotionError(
            f"{version.ref} is not promoted to {alias}: {'; '.join(unmet)}. Nothing was changed; with force it is "
            "done all the same, and the log says so."
        )
    gate = Gate(required=[str(condition) for condition in conditions], forced=unmet)
    return registry.alias(version.full_name, alias, version.version, expect=expect, gate=gate)

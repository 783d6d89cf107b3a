"""The check of a target and its options before anything is loaded, without torch."""

from collections.abc import Iterable
from dataclasses import fields

from finetune.errors import ExportError
from finetune.lookup import did_you_mean
from finetune.plugins import find, is_own, require_known
from finetune.tables import EXPORT_OPTIONS, TARGETS_BESIDE_THE_BASE

NO_ADAPTER = "An export needs an adapter, got ref 'base', which is the plain base. Name an adapter."


def check_choice(target: str, options: Iterable[str]) -> None:
    """Check that a target exists, and that it takes these options.

    Raises:
        ExportError: the target does not exist, or it does not take an option.
    """
    require_known("exports", target, what="target", error=ExportError)
    allowed = sorted(option for option, targets in EXPORT_OPTIONS.items() if target in targets)
    if not is_own("exports", target):
        allowed = sorted(each.name for each in fields(find("exports", target, what="target", error=ExportError)))
    for option in options:
        if option not in allowed:
            raise ExportError(
                f"the target {target} takes no option {option!r}.{did_you_mean(option, allowed)} It takes: "
                f"{', '.join(allowed) or 'none'}."
            )


def check_quantization(target: str, quantization: str | None) -> None:
    """Refuse a quantized base for a target that computes with the base's own weights.

    Raises:
        ExportError: ``quantization`` is set, and the target needs the base's own weights.
    """
    if quantization is not None and target not in TARGETS_BESIDE_THE_BASE:
        raise ExportError(
            f"--quantization {quantization} needs --to {' or '.join(TARGETS_BESIDE_THE_BASE)}, which write no weights "
            f"of the base, got --to {target}. Leave it out."
        )

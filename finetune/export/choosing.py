"""The check of a target and its options before anything is loaded, without torch."""

from collections.abc import Iterable
from dataclasses import fields

from finetune.errors import ExportError
from finetune.lookup import did_you_mean
from finetune.plugins import find, is_own, require_known
from finetune.tables import EXPORT_OPTIONS, TARGETS_BESIDE_THE_BASE

NO_ADAPTER = "ref 'base' is the plain base, and an export is of an adapter: name one"


def check_choice(target: str, options: Iterable[str]) -> None:
    """Check that there is such a target, and that it takes these options.

    Raises:
        ExportError: there is no such target, or it takes no such option.
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
    """Refuse a quantized base where a target computes with the base's own weights.

    Raises:
        ExportError: ``quantization`` is set, and the target computes so.
    """
    if quantization is not None and target not in TARGETS_BESIDE_THE_BASE:
        raise ExportError(
            f"--quantization {quantization} goes with --to {' and '.join(TARGETS_BESIDE_THE_BASE)}, which write no "
            f"weight of the base; {target} takes its weights as they are in its files: leave it out"
        )

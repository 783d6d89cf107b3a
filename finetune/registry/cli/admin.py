"""The administrator's verbs on the command line: verify, gc, reindex."""

import argparse
from datetime import timedelta

from finetune.core.outside_text import safe_line
from finetune.registry.cli.printing import answer, table
from finetune.registry.cli.verbs import AddVerb
from finetune.registry.maintenance.garbage_collection import DEFAULT_GRACE, Garbage, collect
from finetune.registry.maintenance.verification import reindex, verify
from finetune.registry.registry import AdapterRegistry
from finetune.registry.storage.blobs import LEAST_GRACE
from finetune.registry.trust.policy import UNSIGNED


def add_verbs(add: AddVerb) -> None:
    """Add the parsers of these verbs."""
    add("verify", _verify, "hash all published files, and check every log")
    gc = add("gc", _gc, "show the objects that no log names; with --delete, delete them")
    gc.add_argument("--delete", action="store_true", help="delete them; without this nothing is deleted")
    gc.add_argument(
        "--grace",
        type=_days,
        default=DEFAULT_GRACE,
        metavar="DAYS",
        help=f"least age by the store's clock (default: {DEFAULT_GRACE.days}, at least {LEAST_GRACE.days})",
    )
    add("reindex", _reindex, "rebuild the local index, which makes list fast")


def _days(text: str) -> timedelta:
    try:
        return timedelta(days=float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"must be a number of days, got {text!r}") from None


def _verify(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    report = verify(registry)
    summary = f"{report.objects} objects, {report.bytes} bytes, {len(report.problems)} problems"
    lines = [*report.problems]
    if report.signed_by.keys() - {UNSIGNED}:
        signers = ", ".join(f"{count} by {signer}" for signer, count in sorted(report.signed_by.items()))
        lines.append(f"entries signed: {signers}")
    answer(args, vars(report), "\n".join([*map(safe_line, lines), summary]))
    return 1 if report.problems else 0


def _gc(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    found = collect(registry, grace=args.grace, delete=args.delete)
    shown = found.garbage if found.deleted is None else found.deleted
    size = sum(garbage.size for garbage in shown)
    value = {
        "deleted": found.deleted is not None,
        "objects": len(shown),
        "bytes": size,
        "young": found.young,
        "garbage": [_garbage_json(garbage) for garbage in shown],
    }
    rows = [["KEY", "BYTES", "WRITTEN", "WHY"]]
    rows += [[g.key, str(g.size), f"{g.modified:%Y-%m-%dT%H:%M:%SZ}", g.why] for g in shown]
    did = "can be deleted: add --delete" if found.deleted is None else "deleted"
    summary = f"{len(shown)} objects, {size} bytes {did}; {found.young} more that no log names are too young to delete"
    return answer(args, value, f"{table(rows)}\n{summary}" if shown else summary)


def _garbage_json(garbage: Garbage) -> dict[str, object]:
    return {**vars(garbage), "modified": garbage.modified.isoformat()}


def _reindex(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    path, names = reindex(registry)
    return answer(args, {"path": str(path), "names": names}, f"{names} adapters in {path}")

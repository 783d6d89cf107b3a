"""The verbs that compare and promote versions on the command line: diff, promote."""

import argparse
from dataclasses import asdict
from typing import Any

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.core.outside_text import safe_line
from finetune.errors import PromotionError
from finetune.registry.cli.printing import answer, flat, one_line, table, version_json, warn
from finetune.registry.cli.verbs import REF_HELP, AddVerb
from finetune.registry.differences import differences
from finetune.registry.log.conditions import EXAMPLE
from finetune.registry.promotion import promote
from finetune.registry.registry import AdapterRegistry


def add_verbs(add: AddVerb) -> None:
    """Add the parsers of these verbs."""
    diff = add("diff", _diff, "show the differences between two versions: recipe, data, options, metrics, base, files")
    diff.add_argument("a", metavar="REF_A", help=REF_HELP)
    diff.add_argument("b", metavar="REF_B", help="the second version, in the same form")
    promotion = add("promote", _promote, "move an alias to a version if its metrics meet conditions")
    promotion.add_argument("ref", metavar="REF", help=REF_HELP)
    promotion.add_argument("alias", metavar="ALIAS", help="such as prod")
    promotion.add_argument(
        "--require",
        action="append",
        required=True,
        metavar="CONDITION",
        help=f"such as '{EXAMPLE}'; repeatable. test: with the adapter; base: the base alone",
    )
    promotion.add_argument(
        "--expect", type=int, metavar="VERSION", help="refuse unless the alias points to this version now; 0: none"
    )
    promotion.add_argument("--force", action="store_true", help="move the alias anyway; the log records that")


def _diff(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    a, b = registry.resolve(args.a), registry.resolve(args.b)
    for version in dict.fromkeys([a.ref, b.ref]):
        warn(a if version == a.ref else b)
    found = differences(registry, a, b)
    rows = [["WHAT", a.ref, b.ref, "CHANGE"]]
    rows += [[each.path, _cell(each.a), _cell(each.b), _signed(each.change)] for each in found]
    value = {"a": version_json(a), "b": version_json(b), "differences": [asdict(each) for each in found]}
    return answer(args, value, table(rows) if found else f"{a.ref} and {b.ref} do not differ")


def _promote(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    try:
        version = promote(registry, args.ref, args.alias, require=args.require, expect=args.expect, force=args.force)
    except PromotionError as error:
        answer(args, {"promoted": False, "reason": str(error)}, safe_line(f"refused: {error}"))
        return 1
    return answer(args, {"promoted": True, **version_json(version)}, f"{args.alias} -> {one_line(version)}")


def _cell(value: Any) -> str:
    """Return a value of a manifest; a long one as its beginning, or as its length and digest."""
    if isinstance(value, list):
        long = len(value) > 3
        return f"{len(value)} items ({sha256_hex(canonical_json(value))[:8]})" if long else ", ".join(map(flat, value))
    text = flat(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _signed(change: float | None) -> str:
    return "" if change is None else f"{change:+.4g}"

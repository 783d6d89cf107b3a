"""The command ``finetune evaluate``, which prints a table. Importing this module loads no torch."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.outside_text import safe_block
from finetune.errors import RecipeError
from finetune.evaluation.compare import evaluate, table
from finetune.preflight import check_output_place
from finetune.preflight.use import check_reference
from finetune.recipe import load_recipe
from finetune.registry import AdapterRegistry
from finetune.serving.known_bases import find_base

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.evaluation.evaluate import Evaluation
    from finetune.recipe import Recipe

_ABOUT = """\
Evaluate adapters side by side on one base: on the test rows of recipes, or on rows that no recipe names. This machine
stores the predictions of the base alone, and uses them again."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add ``evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="evaluate adapters side by side, on the test rows of recipes or on new rows",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "refs",
        nargs="+",
        metavar="REF",
        help="registry reference, such as medical/brain-mri@prod, an adapter's folder, or `base`",
    )
    parser.add_argument("--on", nargs="+", default=[], metavar="CONFIG", help="recipes whose test rows are used")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every CONFIG")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="rows (JSON Lines or Parquet) instead of a recipe's; without --on the prompts are those of the first "
        "adapter's training",
    )
    parser.add_argument(
        "--base", help="with --data alone: folder, hub id or embedded name (default: where it was last seen)"
    )
    parser.add_argument("--registry", metavar="LOCATION", help="location of the registry, as for `finetune registry`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores as JSON")
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="write a JSON line for each row and adapter: question, images, prediction, references, values, right",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``finetune evaluate ...``, and print the table.

    Returns:
        The exit code: 0.

    Raises:
        FinetuneError: the evaluation cannot be done.
    """
    registry = AdapterRegistry(args.registry)
    for option, path in (("--json", args.json), ("--rows", args.rows)):
        if path is not None:
            check_output_place(path, option=option)
    evaluations = evaluate(args.refs, _recipes(args, registry), registry=registry)
    print(safe_block(table(evaluations)))
    if args.json is not None:
        _write(args.json, json.dumps({"rows": [one.to_json() for one in evaluations]}, indent=2) + "\n")
    if args.rows is not None:
        _write(args.rows, _lines(evaluations))
    return 0


def _recipes(args: argparse.Namespace, registry: AdapterRegistry) -> "list[Recipe]":
    from finetune.evaluation.new_rows import recipe_for, with_rows

    if args.data is None and not args.on:
        raise RecipeError(
            "evaluate needs rows, got neither --on nor --data. Give --on CONFIG for the test rows of a recipe, or "
            "--data FILE for other rows."
        )
    if args.base is not None and (args.on or args.data is None):
        raise RecipeError(
            "--base cannot be used with --on: a CONFIG names its own base. Use --set model.name_or_path=BASE instead."
        )
    if args.set and not args.on:
        raise RecipeError("--set needs a CONFIG to change, got none. Give one with --on CONFIG.")
    recipes = [load_recipe(path, args.set) for path in args.on]
    if args.data is None:
        return recipes
    if recipes:
        return [with_rows(recipe, args.data) for recipe in recipes]
    adapter = next((ref for ref in args.refs if ref != "base"), None)
    manifest = check_reference(adapter, registry) if adapter is not None else None
    if args.base is None and manifest is None:
        raise RecipeError(
            "ref 'base' is the base alone, so it needs a base model, got none. Give --base BASE, or --on CONFIG."
        )
    return [recipe_for(manifest, base=args.base or find_base(manifest.base), file=args.data)]  # type: ignore[union-attr]


def _lines(evaluations: "Sequence[Evaluation]") -> str:
    rows = [{"adapter": one.adapter, "config": one.config, **row.to_json()} for one in evaluations for row in one.rows]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")

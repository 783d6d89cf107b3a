"""Evaluate adapters on the test rows of recipes, on one base, as one table.

    python recipes/evaluate.py REF [REF ...] --on CONFIG [CONFIG ...] [--json FILE]

REF is a registry reference such as medical/brain-mri@latest, an adapter's folder, or `base`. Overrides of the
configs (key=value) may stand after --set.
"""

import argparse
import json
import sys
from pathlib import Path

from finetune.command import CommandParser, exit_code_of
from finetune.preflight import check_comparison, check_output_place
from finetune.recipe import load_recipe


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _evaluate(argv))


def _evaluate(argv: list[str] | None) -> int:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("refs", nargs="+", metavar="REF")
    parser.add_argument("--on", nargs="+", required=True, metavar="CONFIG")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every config")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    recipes = [load_recipe(path, args.set) for path in args.on]
    if args.json:
        check_output_place(args.json, option="--json")
    check_comparison(args.refs, recipes)
    from finetune.evaluation.compare import evaluate, table  # imports torch: not before what needs none

    evaluations = evaluate(args.refs, recipes)
    print(table(evaluations))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"rows": [one.to_json() for one in evaluations]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

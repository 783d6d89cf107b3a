"""The ``finetune`` command: one short function a verb."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import FinetuneError, StoppedError
from finetune.registry import commands as registry_commands


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; an error of ours is one line on stderr and exit code 2, a signal 128 and its number."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except StoppedError as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except FinetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune", description="Adapters for frozen vision-language models.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    demo = verbs.add_parser("demo", help="train two synthetic domains on the pocket model and swap between them")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"), metavar="FOLDER")
    demo.set_defaults(run=_demo)
    train = verbs.add_parser("train", help="run a recipe in this process")
    train.add_argument("config", type=Path)
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.set_defaults(run=_train)
    ask = verbs.add_parser("ask", help="ask one question about a picture")
    ask.add_argument("ref", help="registry reference, adapter folder, or `base`")
    ask.add_argument("image", type=Path)
    ask.add_argument("question")
    ask.add_argument("--base", help="folder, hub id or embedded name of the base")
    ask.set_defaults(run=_ask)
    registry_commands.add_parser(verbs)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from finetune.demo import run_demo

    return run_demo(args.output_dir, json_file=args.json)


def _train(args: argparse.Namespace) -> int:
    from finetune.recipe import load_recipe

    recipe = load_recipe(args.config, args.overrides)
    from finetune.runs import train

    train(recipe)
    return 0


def _ask(args: argparse.Namespace) -> int:
    from finetune.serving.app import load

    print(load(args.ref, base=args.base).ask(args.image, args.question))
    return 0


if __name__ == "__main__":
    sys.exit(main())

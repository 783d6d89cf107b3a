"""The ``finetune`` command: one short function for each verb.

Exit codes: 0, done. 1, the command ran, and the answer is no: ``registry verify`` found problems, ``registry promote``
or a copy between registries was refused, a run of ``sweep`` failed, a claim of the demo did not hold. 2, the command
could not run, with the reason in one line on stderr. 128 + n, signal n stopped it; 141, the reader of the output left
(``| head``).

``finetune.preflight`` checks as much of a command as possible before torch is imported.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.core.base_options import add_base_options
from finetune.core.outside_text import for_stream
from finetune.core.quick_imports import quick_imports
from finetune.errors import DataError
from finetune.evaluation import command as evaluation_command
from finetune.export import command as export_command
from finetune.launch.command import EXIT_CODES, CommandParser, exit_code_of
from finetune.registry import cli as registry_commands
from finetune.server import command as server_command
from finetune.serving import warming

_SWEEP_HELP = (
    "such as seed=1,2,3; a single value applies to all runs; put a value with a comma in quotes or brackets. "
    "A sweep publishes nothing unless adapter.publish is among the keys. It skips finished runs."
)
_SHOWN_PACKAGES = ("torch", "transformers", "peft")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; print an error of this package as one line on stderr."""

    def run() -> int:
        args = _parser().parse_args(argv)
        return int(args.run(args))

    return exit_code_of(run)


class _Version(argparse.Action):
    """An option that prints the versions of this package and of its main libraries, from their metadata."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show versions and exit")

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        print(f"finetune-vlm {_version('finetune-vlm')} ({', '.join(f'{p} {_version(p)}' for p in _SHOWN_PACKAGES)})")
        parser.exit()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="finetune",
        description="Adapters for frozen vision-language models.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def add(verb: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")

    demo = add("demo", "train two synthetic domains on the pocket model and swap between them")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"), metavar="FOLDER")
    demo.set_defaults(run=_demo)
    train = add("train", "run a recipe in this process")
    train.set_defaults(run=_train)
    sweep = add("sweep", "run a recipe with every combination of some values, and compare over the seeds")
    sweep.set_defaults(run=_sweep)
    find_lr = add("find-lr", "show the loss over a growing learning rate, and suggest one; nothing is saved")
    find_lr.add_argument("--first", type=float, default=1e-6, metavar="RATE", help="rate of the first step (1e-6)")
    find_lr.add_argument("--last", type=float, default=1.0, metavar="RATE", help="rate of the last step (1)")
    find_lr.add_argument("--steps", type=int, default=100, metavar="N", help="number of optimizer steps (100)")
    find_lr.set_defaults(run=_find_lr)
    for verb in (train, find_lr, sweep):
        verb.add_argument("config", type=Path, metavar="CONFIG", help="a recipe: a YAML file")
    for verb in (train, find_lr):
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.epochs=5")
    sweep.add_argument("overrides", nargs="*", metavar="key=a,b,c", help=_SWEEP_HELP)
    ask = add("ask", "ask one question about an image")
    ask.add_argument("ref", help="registry reference, adapter folder, or `base`")
    ask.add_argument("image", type=Path, help="image file")
    ask.add_argument("question", help="question about the image")
    ask.add_argument("--base", help="folder, hub id or embedded name of the base")
    ask.add_argument("--registry", metavar="LOCATION", help="folder or URL (default: as of `finetune registry`)")
    add_base_options(ask)
    ask.set_defaults(run=_ask)
    app = add("app", "show a web page on which a base and its adapters answer side by side")
    app.add_argument(
        "refs", nargs="*", metavar="REF", help="references or adapter folders (default: all of the registry)"
    )
    app.add_argument("--base", help="folder, hub id or embedded name of the base (default: that of the first REF)")
    app.add_argument("--registry", metavar="LOCATION", help="folder or URL (default: as of `finetune registry`)")
    app.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    app.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen on, 0 for a free one (7860)")
    add_base_options(app)
    app.set_defaults(run=_app)
    schema = add("schema", "print the JSON schema of recipes, with which editors complete and check them")
    schema.add_argument("file", nargs="?", type=Path, metavar="FILE", help="write it to this file instead")
    schema.add_argument("--markdown", action="store_true", help="the reference of all keys as Markdown, not the schema")
    schema.set_defaults(run=_schema)
    evaluation_command.add_parser(verbs)
    export_command.add_parser(verbs)
    server_command.add_parser(add)
    registry_commands.add_parser(verbs, warming.add_verbs)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from finetune.preflight import check_output_folder, check_output_place

    check_output_folder(args.output_dir, key="--output-dir")
    if args.json is not None:
        check_output_place(args.json, option="--json")
    with quick_imports():
        from finetune.demo import run_demo

    return run_demo(args.output_dir.absolute(), json_file=args.json)


def _train(args: argparse.Namespace) -> int:
    from finetune.runs.command import train_config

    train_config(args.config, args.overrides)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from finetune.runs.sweep import run_sweep

    return run_sweep(args.config, args.overrides)


def _find_lr(args: argparse.Namespace) -> int:
    from finetune.recipe import load_recipe

    recipe = load_recipe(args.config, args.overrides)
    from finetune.preflight import check_rates, check_recipe

    check_rates(args.first, args.last, args.steps)
    check_recipe(recipe, splits=("train",), writes=False)
    from finetune.launch.threads import set_threads

    set_threads(recipe.train.num_threads)  # before torch is imported
    with quick_imports():
        from finetune.runs.find_lr import find_lr

    print(find_lr(recipe, first=args.first, last=args.last, steps=args.steps))
    return 0


def _ask(args: argparse.Namespace) -> int:
    from finetune.preflight import check_question

    check_question(args.ref, args.image, base=args.base, registry=args.registry)
    with quick_imports():
        from finetune.serving.loading import load

    held = {"device": args.device, "dtype": args.dtype, "quantization": args.quantization}
    vlm = load(args.ref, base=args.base, registry=args.registry, **held)
    try:
        found = vlm.answer(args.image, args.question)
    except DataError as error:  # there is only one question, so its name adds nothing
        raise DataError(str(error).removeprefix("row ").removeprefix("question: ")) from error
    print(for_stream(found.text, sys.stdout))
    if found.finish_reason == "length":
        print(f"note: the answer stops at the limit of {found.completion_tokens} tokens", file=sys.stderr)
    return 0


def _app(args: argparse.Namespace) -> int:
    from finetune.playground.running import run_app

    held = {"device": args.device, "dtype": args.dtype, "quantization": args.quantization}
    return run_app(args.refs, base=args.base, registry=args.registry, host=args.host, port=args.port, **held)


def _schema(args: argparse.Namespace) -> int:
    if args.markdown:
        from finetune.recipe.reference import reference_text as text_of
    else:
        from finetune.recipe.schema import schema_text as text_of

    if args.file is None:
        print(text_of(), end="")
    else:
        from finetune.preflight import check_output_place

        check_output_place(args.file, option="FILE")
        args.file.parent.mkdir(parents=True, exist_ok=True)
        args.file.write_text(text_of(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

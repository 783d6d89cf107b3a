"""The command ``finetune registry``: its subcommands read the command line and print tables or JSON."""

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

from finetune.core.outside_text import safe_line
from finetune.registry.cli import admin, between, daily, doctor, mirroring, promotion, signing
from finetune.registry.cli.verbs import AddVerb
from finetune.registry.registry import AdapterRegistry


def add_parser(
    subparsers: "argparse._SubParsersAction[Any]", *more: Callable[[AddVerb], None]
) -> argparse.ArgumentParser:
    """Add ``registry`` and its subcommands; the parsed arguments hold ``run`` as ``args.run``.

    Args:
        subparsers: the subparsers of the command.
        more: functions that add further verbs, which need what stands above the registry.
    """
    parser = subparsers.add_parser(
        "registry",
        help="publish, find and fetch adapters",
        description="Publish, find and fetch adapters, and move their aliases.",
    )
    parser.set_defaults(run=run)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--registry",
        metavar="LOCATION",
        help="folder of the registry, or s3://, gs:// or az:// with bucket and prefix (default: $FINETUNE_REGISTRY, "
        "or ~/.finetune/registry)",
    )
    common.add_argument("--json", action="store_true", help="print one JSON value instead of text")

    def add(
        name: str, verb: Callable[[AdapterRegistry, argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common])
        added.set_defaults(run_verb=verb)
        return added

    for kind in (daily, promotion, between, mirroring, signing, admin, doctor):
        kind.add_verbs(add)
    for add_verbs in more:
        add_verbs(add)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run ``finetune registry ...``, and print the answer.

    Returns:
        The exit code: 0; or 1 when there were problems, a promotion or a copy was refused, or an adapter could not be
        listed.

    Raises:
        FinetuneError: the verb fails.
    """

    def show(message: Warning | str, *where: object) -> None:
        print(f"warning: {safe_line(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        code: int = args.run_verb(AdapterRegistry(args.registry, signer=getattr(args, "sign_with", None)), args)
    return code

"""What a file of verbs is given to add its own to ``finetune registry``."""

import argparse
from collections.abc import Callable
from typing import Protocol

from finetune.registry.registry import AdapterRegistry

REF_HELP = "ns/name, ns/name@17, ns/name@prod or ns/name@sha256:<hex>"


def add_signing(parser: argparse.ArgumentParser) -> None:
    """Add the option of every verb that writes to a log."""
    parser.add_argument(
        "--sign-with",
        metavar="KEY",
        help="file of the private key that signs what is written (default: $FINETUNE_SIGNING_KEY)",
    )


class AddVerb(Protocol):
    """Adds a verb, with the options that all have, and returns its parser."""

    def __call__(
        self, name: str, verb: Callable[[AdapterRegistry, argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        """Add it.

        Args:
            name: the word on the command line.
            verb: does it, prints the answer and returns the exit code.
            text: what it does, for ``--help``.
        """
        ...

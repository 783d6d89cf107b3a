"""The interface with which a module adds its verbs to ``finetune registry``."""

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
        help="file of the private key that signs the new entry (default: $FINETUNE_SIGNING_KEY)",
    )


class AddVerb(Protocol):
    """A function that adds a verb, with the options that all verbs have, and returns its parser."""

    def __call__(
        self, name: str, verb: Callable[[AdapterRegistry, argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        """Add the verb.

        Args:
            name: the name of the verb on the command line.
            verb: the function that runs the verb, prints the answer and returns the exit code.
            text: the help of the verb, for ``--help``.
        """
        ...

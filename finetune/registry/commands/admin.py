"""The administrator's verbs on the command line: verify."""

import argparse

from finetune.registry.admin import verify
from finetune.registry.commands.printing import answer, printable
from finetune.registry.commands.verbs import AddVerb
from finetune.registry.registry import AdapterRegistry
from finetune.registry.trust import NOBODY


def add_verbs(add: AddVerb) -> None:
    """Adds the parsers of these verbs."""
    add("verify", _verify, "hash everything that is published, and check every log")


def _verify(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    report = verify(registry)
    summary = f"{report.objects} objects, {report.bytes} bytes, {len(report.problems)} problems"
    lines = [*report.problems]
    if report.signed_by.keys() - {NOBODY}:
        signers = ", ".join(f"{count} by {signer}" for signer, count in sorted(report.signed_by.items()))
        lines.append(f"entries signed: {signers}")
    answer(args, vars(report), "\n".join([*map(printable, lines), summary]))
    return 1 if report.problems else 0

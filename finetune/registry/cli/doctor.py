"""The verb on the command line that checks a location: doctor."""

import argparse
from dataclasses import asdict

from finetune.registry.cli.printing import answer, table
from finetune.registry.cli.verbs import AddVerb
from finetune.registry.maintenance.doctor import diagnose
from finetune.registry.registry import AdapterRegistry


def add_verbs(add: AddVerb) -> None:
    """Add the parser of this verb."""
    add("doctor", _doctor, "check that many users can publish here at the same time, and leave the location unchanged")


def _doctor(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    findings = diagnose(registry)
    fit = all(finding.verdict != "failed" for finding in findings)
    rows = [["PROBE", "VERDICT", "WHAT WAS SEEN"], *([f.probe, f.verdict, f.text] for f in findings)]
    conclusion = f"{registry.location} {'is fit to be shared' if fit else 'must not be shared by several writers'}"
    answer(
        args,
        {"location": registry.location, "fit": fit, "findings": [asdict(finding) for finding in findings]},
        f"{table(rows)}\n{conclusion}",
    )
    return 0 if fit else 1

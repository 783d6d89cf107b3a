"""The signature audit of a whole log, for the report of ``verify``."""

from collections import Counter
from collections.abc import Iterator, Sequence

from finetune.registry.log.commits import Commit
from finetune.registry.log.guard import Guard, contradiction
from finetune.registry.log.log import Log
from finetune.registry.trust.signing import manifest_message


def count_signers(guard: Guard, log: Log, entries: Sequence[Commit]) -> Counter[str]:
    """Return {signer, as ``Verdict`` names it: number of these entries that it signed}."""
    return Counter(guard.verify_entry(log.namespace, log.name, entry).signer for entry in entries)


def refused_entries(guard: Guard, log: Log, entries: Sequence[Commit]) -> Iterator[tuple[int, str]]:
    """Yield each entry that the trust policy does not accept: its number, and the reason.

    A forged signature is a problem in every entry. A missing signature, or a key that is not accepted, is one only in
    entries still in use: the newest, and those that published a version that is not yanked. The digests in later
    entries protect the rest.

    Args:
        guard: the guard of the registry.
        log: the log.
        entries: its readable entries, ascending.
    """
    if not entries:
        return
    head = entries[-1]
    asks = guard.policy.of(log.namespace).signatures != "off"
    for entry in entries:
        verdicts = [guard.verify_entry(log.namespace, log.name, entry)]
        is_used = entry.digest == head.digest
        if entry.op == "publish":
            message = manifest_message(entry.manifest)
            verdicts.append(guard.policy.verify_signature(log.namespace, entry.manifest_signature, message))
            is_used = is_used or str(entry.version) not in head.yanked
        for what, verdict in zip(("", "its manifest: "), verdicts, strict=False):
            if verdict.problem and (verdict.forged or (asks and is_used)):
                yield entry.seq, what + verdict.problem
                break
    if asks and (problem := contradiction(log, head, guard.seen.newest(f"{log.namespace}/{log.name}"))):
        yield head.seq, problem

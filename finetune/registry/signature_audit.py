"""Who vouches for what in a whole log, as ``verify`` reports it."""

from collections import Counter
from collections.abc import Iterator, Sequence

from finetune.registry.commits import Commit
from finetune.registry.guard import Guard, contradiction
from finetune.registry.log import Log
from finetune.registry.signing import manifest_message


def count_signers(guard: Guard, log: Log, entries: Sequence[Commit]) -> Counter[str]:
    """Return {signer, as ``Verdict`` names them: how many of these entries they signed}."""
    return Counter(guard.verify_entry(log.namespace, log.name, entry).signer for entry in entries)


def unvouched(guard: Guard, log: Log, entries: Sequence[Commit]) -> Iterator[tuple[int, str]]:
    """Yield what the trust policy does not accept: the number of the entry, and why.

    A signature that its key did not make is wrong wherever it stands. A key that is not accepted, or none, matters
    where it could still be relied on: in the newest entry, and in those that published a version that is not yanked.
    The rest is history, for which the newest entry vouches.

    Args:
        guard: of the registry.
        log: the log.
        entries: those of its entries that can be read, ascending.
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

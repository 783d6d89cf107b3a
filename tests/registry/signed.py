"""Keys, policies, and attacks on a log by an attacker who controls the store."""

import functools
from pathlib import Path

from finetune.registry.log.commits import Commit, log_key
from finetune.registry.trust.policy import TrustPolicy
from finetune.registry.trust.signing import SigningKey

NAME = "medical/brain-mri"


@functools.cache
def key(name: str) -> SigningKey:
    """Return the key of a name; the same one each time."""
    return SigningKey.generate()


def policy(signatures: str = "require", *, keys=("alice",), revoked=(), others=()) -> TrustPolicy:
    """A policy for ``medical``, where ``alice`` may sign; bob may in ``retail``."""
    names = dict.fromkeys([*keys, "bob", *revoked])
    return TrustPolicy.model_validate(
        {
            "keys": [key(name).public(name).line for name in names],
            "namespaces": {
                "medical": {"signatures": signatures, "keys": list(keys)},
                "retail": {"signatures": signatures, "keys": ["bob", *others]},
            },
            "revoked": dict.fromkeys(revoked, "stolen"),
        }
    )


def entry_path(location: str | Path, seq: int, name: str = NAME) -> Path:
    return Path(location, log_key(*name.split("/"), seq))


def read_entry(location: str | Path, seq: int, name: str = NAME) -> Commit:
    return Commit.parse(entry_path(location, seq, name).read_bytes(), source=str(seq))


def write_entry(location: str | Path, commit: Commit, name: str = NAME) -> None:
    entry_path(location, commit.seq, name).write_bytes(commit.to_bytes())


def change(location: str | Path, seq: int, name: str = NAME, **fields: object) -> None:
    """Changes an entry and leaves the rest as it is."""
    write_entry(location, read_entry(location, seq, name).model_copy(update=fields), name)


def rechain(location: str | Path, sign=lambda commit: commit, name: str = NAME) -> None:
    """Write a whole log anew: each entry as ``sign`` returns it, upon what that made of the one before."""
    previous = None
    for path in sorted(entry_path(location, 1, name).parent.iterdir()):
        commit = Commit.parse(path.read_bytes(), source=path.name)
        commit = sign(commit.model_copy(update={"prev": previous}))
        write_entry(location, commit, name)
        previous = commit.digest


def unsigned(commit: Commit) -> Commit:
    return commit.model_copy(update={"signature": None, "manifest_signature": None})


def signed_by(who: str, name: str = NAME):
    return lambda commit: unsigned(commit).signed(key(who), *name.split("/"))

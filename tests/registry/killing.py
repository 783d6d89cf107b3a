"""What a process does that is killed on the way; it imports little, so that many can be started."""

import builtins
import os
import signal

from finetune.registry import AdapterRegistry, collect

NAME = "medical/brain-mri"
TXN = f"{0:012x}" + "a" * 20
VERBS = {
    "publish": lambda registry, folder: registry.publish(folder, aliases=["prod"], txn=TXN),
    "alias": lambda registry, folder: registry.alias(NAME, "prod", 1),
    "rollback": lambda registry, folder: registry.rollback(NAME, "test"),
    "yank": lambda registry, folder: registry.yank(f"{NAME}@1", reason="wrong rows"),
    "gc": lambda registry, folder: collect(registry, delete=True),
}


def run_until(step: int, verb: str, location: str, folder: str) -> None:
    """Kills its own process before the ``step``-th call, from 0, by which it would touch the disk."""
    left = step

    def counted(real):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*args, **kwargs)

        return call

    os.fsync = lambda descriptor: None  # what a process has written outlives it; syncing is for power cuts
    for name in ("open", "fsync", "link", "replace", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = counted(builtins.open)
    VERBS[verb](AdapterRegistry(location), folder)

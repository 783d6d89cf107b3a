"""A child process that gets the signals we get. Needs only the standard library."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def run_child(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    passed_on: list[int] | None = None,
) -> int:
    """Runs ``command``, passing signals on to it, and returns its exit code (128 + n for signal n).

    On POSIX the child has a session of its own and a signal goes to its whole group, each process
    once: a Ctrl-C at the terminal reaches only us, and a SIGTERM sent to us alone still ends the
    processes that the child started. On Windows the console itself gives Ctrl-C to all of them.

    Args:
        command: the program and its arguments.
        env: its environment.
        cwd: its folder; None for ours.
        passed_on: filled with the signals that were passed on: whoever runs several children stops then.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(signum: int, _frame: object) -> None:
        if child is None:
            early.append(signum)
            return
        if passed_on is not None:
            passed_on.append(signum)
        if sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signum)
        elif signum != signal.SIGINT:
            child.terminate()

    with _handling(forward):
        child = subprocess.Popen(list(command), env=dict(env), cwd=cwd, start_new_session=os.name == "posix")
        for signum in early:
            forward(signum, None)
        code = child.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _handling(handler: Any) -> Iterator[None]:
    """Handles the signals that ask to stop with ``handler``; one that was ignored (nohup) stays so."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (getattr(signal, name) for name in names if hasattr(signal, name)):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                previous[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in previous.items():
            signal.signal(signum, old)

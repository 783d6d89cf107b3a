"""A child process that gets this process's signals; the caller waits for it and for its own children."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.lookup import import_string


def run_child(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    passed_on: list[int] | None = None,
) -> int:
    """Run ``command``, passing signals on to it, and return its exit code (128 + n for signal n).

    On POSIX the child has a session of its own and a signal goes to its whole group, each process once. So a Ctrl-C at
    the terminal reaches only this process, and a SIGTERM to this process alone still ends the processes that the child
    started. On Windows the console gives Ctrl-C to all of them.

    A launcher ends on the signal at once, while the training that it started still saves its state, so this function
    waits for the whole group. A launcher's exit code is 1 for each exit code of its processes, so after a signal n this
    function returns 128 + n for 1.

    Args:
        command: the program and its arguments.
        env: the environment of the child.
        cwd: the current folder of the child; None for that of this process.
        passed_on: a list that gets each signal that was passed on, so that a caller with several children can stop.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []
    signals = passed_on if passed_on is not None else []

    def forward(signum: int, _frame: object) -> None:
        if child is None:
            early.append(signum)
            return
        signals.append(signum)
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
        if signals and os.name == "posix":
            _wait_for_group(child.pid)
    if signals and code == 1:
        return 128 + signals[0]
    return code if code >= 0 else 128 - code


def _wait_for_group(group: int) -> None:
    """Wait until no process of ``group`` runs; a zombie does not count."""
    process_iter, status = import_string("psutil:process_iter"), import_string("psutil:STATUS_ZOMBIE")

    def is_running(process: Any) -> bool:
        try:
            return os.getpgid(process.pid) == group and process.status() != status
        except (OSError, import_string("psutil:Error")):
            return False

    while any(is_running(process) for process in process_iter()):
        time.sleep(0.1)


@contextlib.contextmanager
def _handling(handler: Any) -> Iterator[None]:
    """Handle the signals that ask to stop with ``handler``; an ignored signal (nohup) stays ignored."""
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

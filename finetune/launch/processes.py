"""Several training processes as one command, which shows a failure once and returns its exit code.

::

    python -m finetune.launch.processes LAUNCHER [ARGUMENT ...]

runs the module of a launcher (``torch.distributed.run``, ``accelerate.commands.launch``) in this process. A launcher
ends with exit code 1 for any exit code of its processes, and prints 40 lines about it. So each process writes its
failure to a file in a folder of this run. The earliest failure there stopped the run. The others are its consequences,
such as a closed connection. Without such a file, all output stays visible.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.outside_text import safe_block
from finetune.launch.command import CANNOT, READER_LEFT, exit_code_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

VARIABLE = "FINETUNE_FAILURES"  # the folder, for the processes
_KILLED_BY_LAUNCHER = (signal.SIGTERM, signal.SIGINT)  # a launcher sends these to the others when one process fails


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The end of a process that failed.

    Attributes:
        process: the number of the process, from 0.
        of: the number of processes.
        time: the time of the end, in seconds since the epoch.
        code: the exit code of the process.
        message: the text of an error of this package, or of a stop; empty where there is none.
        traceback: the traceback of any other exception.
    """

    process: int
    of: int
    time: float
    code: int
    message: str = ""
    traceback: str = ""

    @property
    def where(self) -> str:
        """The name of the process for messages, with its number where there are several."""
        return f"process {self.process} of {self.of}" if self.of > 1 else "the training process"

    @property
    def is_stop(self) -> bool:
        """True if a signal asked the process to stop; a launcher sends one to the others when one process fails."""
        return self.code > 128 and self.code != READER_LEFT


def exit_code_of_process(run: Callable[[], int | None]) -> int:
    """Run the work of one process and return its exit code; leave a failure for the launcher to show.

    Under another launcher, each process shows its own failure, with its number.

    Args:
        run: the work, as a function that returns the exit code; None stands for 0.
    """
    folder = os.environ.get(VARIABLE)
    process, of = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    lines: list[str] = []
    trace = ""
    try:
        code = exit_code_of(lambda: run() or 0, show=lines.append)
    except Exception:
        if not folder:
            raise
        code, trace = 1, safe_block(traceback.format_exc())
    failure = Failure(process=process, of=of, time=time.time(), code=code, message="\n".join(lines), traceback=trace)
    if code and not (folder and _leave(failure, Path(folder))):
        where = f"{failure.where}: " if of > 1 else ""
        for text in (*lines, *filter(None, [trace])):
            print(f"{where}{text}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a launcher, show the errors that stopped its processes, and return the exit code."""
    module, *args = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory(prefix="finetune-failures-") as folder:
        os.environ[VARIABLE] = folder
        try:
            code, signals = _launch(module, args)
        finally:
            del os.environ[VARIABLE]
        failures = sorted(_read(Path(folder)), key=lambda failure: failure.time)
    text, code = conclude(failures, code, signals)
    if text:
        print(text, file=sys.stderr)
    return code


def conclude(failures: Sequence[Failure], code: int, signals: Mapping[int, int]) -> tuple[str, int]:
    """Return the text to show for a run that ended, and its exit code.

    Args:
        failures: the failures of the processes, the earliest first.
        code: the exit code of the launcher.
        signals: each process that a signal ended -> the signal, without the signals of the launcher.
    """
    if code == 0:
        return "", 0
    if signals:
        lines = [_killed(process, signum) for process, signum in signals.items()]
        return "\n".join([*lines, *map(_briefly, failures)]), 128 + next(iter(signals.values()))
    if not failures:
        return "", code
    first = next((failure for failure in failures if not failure.is_stop), failures[0])
    if first.traceback:
        title = f"{first.where} failed:\n" if first.of > 1 else ""
        others = [_briefly(other) for other in failures if other is not first and other.traceback != first.traceback]
        return "\n".join([f"{title}{first.traceback.rstrip()}", *others]), first.code
    if first.code != CANNOT:  # all stopped with the same message, or the reader has left
        return first.message, first.code
    by_message: dict[str, list[Failure]] = {}
    for failure in failures:
        if failure.code == CANNOT:
            by_message.setdefault(failure.message, []).append(failure)
    return "\n".join(_with_processes(message, by) for message, by in by_message.items()), CANNOT


def _with_processes(message: str, by: Sequence[Failure]) -> str:
    of = by[0].of
    if len(by) == of:
        return message
    numbers = ", ".join(str(number) for number in sorted(failure.process for failure in by))
    return f"{message} (in process {numbers} of {of})"


def _killed(process: int, signum: int) -> str:
    name = signal.Signals(signum).name
    why = " The system sends it when memory runs out; check its log (dmesg)." if name == "SIGKILL" else ""
    return f"the signal {name} ended process {process}.{why}"


def _briefly(failure: Failure) -> str:
    last = (failure.traceback or failure.message).strip().splitlines()[-1:]
    return f"{failure.where} then ended, too: {''.join(last)[:300] or f'exit code {failure.code}'}"


def _leave(failure: Failure, folder: Path) -> bool:
    """Write a failure to its file; return whether that was possible."""
    try:
        aside = folder / f".{failure.process}"
        aside.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        aside.replace(folder / f"{failure.process}.json")
    except OSError:
        return False
    return True


def _read(folder: Path) -> Iterator[Failure]:
    for path in folder.glob("[0-9]*.json"):
        yield Failure(**json.loads(path.read_text(encoding="utf-8")))


def _launch(module: str, args: Sequence[str]) -> tuple[int, dict[int, int]]:
    """Run a launcher's module; return its exit code, and the signals that ended processes first."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.argv = [module, *args]
    try:
        with _outliving_signals():
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return (stop.code if isinstance(stop.code, int) else int(stop.code is not None)), {}
    except ChildFailedError as error:
        codes = {process: failure.exitcode for process, failure in error.failures.items()}
        signals = {process: -code for process, code in codes.items() if code < 0}
        return 1, {process: n for process, n in signals.items() if n not in _KILLED_BY_LAUNCHER}
    except SignalException as stop:
        return 128 + int(stop.sigval), {}
    return 0, {}


@contextlib.contextmanager
def _outliving_signals() -> Iterator[None]:
    """Keep this process alive on a signal, which its processes get too, until these have saved their state."""
    previous: dict[int, Any] = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)
        if signum is not None and signal.getsignal(signum) is not signal.SIG_IGN:
            previous[signum] = signal.signal(signum, lambda *_: None)
    try:
        yield
    finally:
        for signum, old in previous.items():
            signal.signal(signum, old)


if __name__ == "__main__":
    sys.exit(main())

"""Shared parts of all commands: the parser, one line for an error, exit codes, closed pipes.

Needs only the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import select
import signal
import sys
from typing import TYPE_CHECKING, Any

from finetune.core.extras import missing_extras_named
from finetune.core.outside_text import safe_block
from finetune.errors import FinetuneError, StoppedError
from finetune.lookup import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

CANNOT = 2  # exit code of a command that could not run
READER_LEFT = 141  # 128 + SIGPIPE, as in a shell
EXIT_CODES = """\
exit codes:
  0      done
  1      the command ran, and the answer is no: problems found, a promotion or copy refused, a run failed
  2      the command could not run; stderr gives the reason
  128+n  signal n stopped the command; 141: the reader of the output closed it, as `| head` does
"""


class CommandParser(argparse.ArgumentParser):
    """A parser whose subcommands show their own usage for an unknown option, and suggest the closest one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Return the parsed arguments; for unknown ones, end with the usage of this command and not of its parent."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            unknown = next((word for word in rest if word.startswith("-")), None)
            if unknown is None:
                self.error(f"unexpected {' '.join(rest)}: put arguments without a dash before the options")
            name = unknown.partition("=")[0]
            known = [option for option in self._option_string_actions if option.startswith("--")]
            self.error(f"unknown option {name}.{did_you_mean(name, known)} --help lists all options.")
        return found, rest

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse would drop an OSError here, and so hide that the reader has left.
        if message:
            (file or sys.stderr).write(message)


def exit_code_of(run: Callable[[], int], *, show: Callable[[str], object] | None = None) -> int:
    """Run a command and return its exit code; print an error of this package as one line on stderr.

    Args:
        run: the command, as a function that returns its exit code.
        show: the function that gets the line; by default it goes to stderr.
    """
    show = show or _print
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        try:
            with missing_extras_named():
                code = run()
        finally:
            # Flush here: nothing can catch an error at the end of the interpreter.
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not readers_left():
            raise
        return READER_LEFT
    except StoppedError as stop:
        show(safe_block(str(stop)))
        return stop.exit_code
    except FinetuneError as error:
        show(safe_block(f"error: {error}"))
        return CANNOT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _print(line: str) -> None:
    # The reader of stderr may have left; the exit code still reports the failure.
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


def readers_left() -> bool:
    """Return whether the reader of stdout or stderr has closed it, and drop later output to it.

    A pipe to another process or a socket may break too: that is another error, which this function does not hide.
    """
    gone = [stream for stream in (sys.stdout, sys.stderr) if _reader_left(stream)]
    for stream in gone:
        # The interpreter flushes at its end, and would report an error then.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(gone)


def _reader_left(stream: Any) -> bool:
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):  # no stream, a closed one, or one in memory
        return False
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))

"""Signals: the first is noted, its echo ignored, the second obeyed at once."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from finetune.training.stopping import SIGNALS, Stopping, leave_signals_to_the_parent

posix = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


def in_process(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)


@posix
@pytest.mark.parametrize("signum", SIGNALS)
def test_the_first_is_noted_and_its_echo_ignored(signum, monkeypatch, capfd):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # ignored in the background, otherwise
    before = [signal.signal(number, signal.SIG_DFL) for number in SIGNALS]
    with Stopping() as stopping:
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)
        assert stopping.signum == signum
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert capfd.readouterr().err.count("stopping after this step") == 1


@posix
@pytest.mark.parametrize("signum", SIGNALS)
def test_the_second_ends_the_process_at_once(signum):
    done = in_process(f"""
        import os, signal, time
        from finetune.training.stopping import Stopping
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with Stopping(main=False) as stopping:
            os.kill(os.getpid(), {int(signum)})
            time.sleep(1.2)
            os.kill(os.getpid(), {int(signum)})
            time.sleep(20)
    """)
    assert done.returncode == -signum and done.stderr == ""


@posix
def test_a_signal_that_was_ignored_stays_so():
    done = in_process("""
        import os, signal
        from finetune.training.stopping import Stopping
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Stopping() as stopping:
            os.kill(os.getpid(), signal.SIGINT)
            print(stopping.signum)
    """)
    assert done.stdout == "None\n"


@posix
def test_a_worker_lives_on():
    """Both at once, as a terminal and a launcher send them to the whole group."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        leave_signals_to_the_parent(0)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

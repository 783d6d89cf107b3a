"""Contestants side by side: a process each, one of them running at a time, in alternating rounds."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contestants import CONTESTANTS
from benchmarks.gate import Gate, Ready, Round
from finetune.errors import FinetuneError
from finetune.launch.hardware import find_hardware, num_cores
from finetune.launch.launcher import training_env
from finetune.lookup import import_string

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from multiprocessing.connection import Connection

    from benchmarks.contestants import Job

SAMPLE_SECONDS = 0.005  # between two samples of a process's memory


class BenchmarkError(FinetuneError):
    """The contestants could not be measured, or did not do the same work."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures of one contestant.

    Attributes:
        rounds: the rounds, without the first one, which warms up.
        losses: the loss of every step, the warm-up included.
        trainable: the number of trainable parameters.
        supervised: the number of supervised tokens of each step.
        fill_seconds: the wall time of the work done once before the first step.
        peak_bytes: the largest anonymous memory of its process, from its start to its end.
        training_peak_bytes: the same, from its first step on.
        cuda_bytes: most that torch had allocated on the GPU.
        flops: floating-point operations of a step; 0 where they were not counted.
    """

    rounds: list[Round]
    losses: list[float]
    trainable: int
    supervised: list[int]
    fill_seconds: float
    peak_bytes: int
    training_peak_bytes: int
    cuda_bytes: int
    flops: float

    @property
    def seconds(self) -> float:
        """Median wall time of a step."""
        return statistics.median(one.seconds / len(one.losses) for one in self.rounds)

    @property
    def cpu_seconds(self) -> float:
        """Median CPU time of a step."""
        return statistics.median(one.cpu_seconds / len(one.losses) for one in self.rounds)

    def mfu(self, peak_tflops: float) -> float:
        """Return the share of a device's ``peak_tflops`` that the executed operations make up."""
        return self.flops / self.seconds / (peak_tflops * 1e12)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "step_seconds": self.seconds,
            "step_cpu_seconds": self.cpu_seconds,
            "round_seconds": [one.seconds for one in self.rounds],
            "round_cpu_seconds": [one.cpu_seconds for one in self.rounds],
            "losses": self.losses,
            "trainable": self.trainable,
            "supervised_per_step": self.supervised[0],
            "fill_seconds": self.fill_seconds,
            "peak_bytes": self.peak_bytes,
            "training_peak_bytes": self.training_peak_bytes,
            "cuda_bytes": self.cuda_bytes,
            "step_flops": self.flops,
        }


def measure(jobs: Mapping[str, Job], *, steps: int, rounds: int) -> dict[str, Measured]:
    """Return the figures of each contestant, after a round that is not counted.

    Args:
        jobs: each contestant -> its job; all run for ``(rounds + 1) * steps`` steps.
        steps: of a round.
        rounds: the number of rounds that count.

    Raises:
        BenchmarkError: a contestant failed; the message has its last output.
    """
    workers: dict[str, Worker] = {}
    found: dict[str, list[Round]] = {name: [] for name in jobs}
    try:
        for name, job in jobs.items():
            workers[name] = Worker(name, job, steps=steps)
            workers[name].load()
        names = [*workers]
        for number in range(rounds + 1):
            first = number % len(names)  # no contestant always follows the same one
            for name in names[first:] + names[:first]:
                found[name].append(workers[name].round())
            print(f"  round {number} of {rounds}" if number else "  warmed up", flush=True)
        for worker in workers.values():
            worker.finish()
    finally:
        for worker in workers.values():
            worker.close()
    return {name: worker.measured(found[name]) for name, worker in workers.items()}


class Worker:
    """The process of a contestant, for the measuring process.

    Args:
        name: the name of the contestant.
        job: the job of the contestant.
        steps: of a round.
    """

    def __init__(self, name: str, job: Job, *, steps: int):
        self.name, self.log = name, job.scratch.with_suffix(".log")
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(name, job, steps, theirs, self.log)
        )
        with _environment(job):
            self._process.start()
        theirs.close()
        self._memory = _Memory(self._process.pid or 0)
        self._ready: Ready | None = None

    def load(self) -> None:
        """Wait until the contestant has loaded everything."""
        self._ready = self._receive(Ready)

    def round(self) -> Round:
        """Run the contestant for a round."""
        self._connection.send("go")
        return self._receive(Round)

    def finish(self) -> None:
        """Run the contestant to its end."""
        self._connection.send("go")
        self._process.join()

    def close(self) -> None:
        """End the process at any point of its run."""
        self._memory.stop()
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()
        self._connection.close()

    def measured(self, rounds: list[Round]) -> Measured:
        """Return the figures of all ``rounds``, the first of which is the warm-up."""
        assert self._ready is not None
        return Measured(
            rounds=rounds[1:],
            losses=[loss for one in rounds for loss in one.losses],
            trainable=self._ready.trainable,
            supervised=[count for one in rounds for count in one.supervised],
            fill_seconds=self._ready.fill_seconds,
            peak_bytes=self._memory.peak,
            training_peak_bytes=self._memory.peak_since_mark,
            cuda_bytes=max(one.cuda_bytes for one in rounds),
            flops=rounds[0].flops / len(rounds[0].losses),
        )

    def _receive(self, kind: type) -> Any:
        self._memory.watch()
        try:
            answer = self._connection.recv()
        except EOFError:
            answer = "the process ended"
        finally:
            self._memory.rest()
        if kind is Ready:
            self._memory.mark()
        if not isinstance(answer, kind):
            written = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
            raise BenchmarkError(f"{self.name} could not be measured: {answer}\n{written[-3000:]}")
        return answer


@contextmanager
def _environment(job: Job) -> Iterator[None]:
    """Set the variables that a process reads when it starts; all compute with the same number of threads."""
    before = dict(os.environ)
    new = {"OMP_NUM_THREADS": str(num_cores())} | before
    if job.device == "cpu":
        new["ACCELERATE_USE_CPU"] = "true"
    os.environ.update(training_env(new, hardware=find_hardware(new), nproc=1) if job.launched else new)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Memory:
    """Read a process's anonymous memory from outside, while it is watched, so that it costs the process nothing.

    The kernel keeps a high-water mark of all loaded memory only, files that are mapped included.
    """

    def __init__(self, pid: int):
        self.peak = self.peak_since_mark = 0
        self._status = Path(f"/proc/{pid}/status")
        self._watched, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def watch(self) -> None:
        self._watched.set()

    def rest(self) -> None:
        self._watched.clear()

    def mark(self) -> None:
        self.peak_since_mark = 0

    def stop(self) -> None:
        self._stopped = True
        self._watched.set()
        self._thread.join()

    def _look(self) -> None:
        while self._watched.wait() and not self._stopped:
            anonymous = self._anonymous()
            self.peak, self.peak_since_mark = max(self.peak, anonymous), max(self.peak_since_mark, anonymous)
            time.sleep(SAMPLE_SECONDS)

    def _anonymous(self) -> int:
        """Return bytes; 0 if the process has ended, or the system has no /proc."""
        try:
            lines = self._status.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _work(name: str, job: Job, steps: int, connection: Connection, log: Path) -> None:
    """Run a contestant in a process of its own; its output goes into ``log``."""
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        import_string(CONTESTANTS[name])(job, Gate(connection, steps, counts_flops=job.device == "cuda"))
    except EOFError:  # the measuring process has ended
        return
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        connection.send(f"{type(error).__name__}: {error}")

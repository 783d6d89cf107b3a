"""What is shown of a run over several processes that ends badly: once, and with the exit code of the command."""

import os
import subprocess
import sys

import pytest

from tests.distributed.conftest import ROOT, TORCHRUN, environment

TWO = ("-m", "finetune.launch.processes", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
DRIVER = """
import os, signal, sys, time
from pathlib import Path
from finetune.errors import DataError
from finetune.launch.processes import exit_code_of_process

rank, how, folder = int(os.environ["RANK"]), sys.argv[1], Path(sys.argv[2])

def meet():
    (folder / str(rank)).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)

def work():
    meet()
    if how == "all":
        raise DataError("train.jsonl, line 3: not JSON")
    if rank == 0:
        if how in ("closed", "killed"):
            time.sleep(1)
            raise RuntimeError("Connection closed by peer")
        time.sleep(60)
    if how in ("one", "closed"):
        raise DataError("train.jsonl, line 7: not JSON")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"crash": lambda: 1 / 0}[how]()

sys.exit(exit_code_of_process(work))
"""


@pytest.fixture
def fail(tmp_path):
    """Return a function: how two processes fail -> exit code and stderr of the launcher."""
    (tmp_path / "driver.py").write_text(DRIVER)

    def start(how, launcher=TWO):
        met = tmp_path / "met"
        met.mkdir()
        command = [sys.executable, *launcher, str(tmp_path / "driver.py"), how, str(met)]
        done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    return start


@pytest.mark.distributed
def test_an_error_of_all_processes_is_shown_once(fail):
    code, output = fail("all")
    assert code == 2
    assert output.startswith("error: train.jsonl, line 3: not JSON") and output.count("\n") == 1, output


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["one", "closed"])
def test_an_error_of_one_process_names_it_and_hides_what_follows_from_it(fail, how):
    assert fail(how) == (2, "error: train.jsonl, line 7: not JSON (in process 1 of 2)\n")


@pytest.mark.distributed
def test_a_crash_is_shown_whole_and_once(fail):
    code, output = fail("crash")
    assert code == 1
    assert output.startswith("process 1 of 2 failed:\nTraceback (most recent call last):") and "return {" in output
    assert output.count("Traceback") == 1 and output.rstrip().endswith("ZeroDivisionError: division by zero"), output


@pytest.mark.distributed
def test_a_process_that_the_system_killed_is_named(fail):
    code, output = fail("killed")
    assert code == 128 + 9 and output.startswith("the signal SIGKILL ended process 1.") and "Traceback" not in output, (
        output
    )


@pytest.mark.distributed
def test_under_a_plain_launcher_each_process_shows_its_own(fail):
    code, output = fail("closed", (*TORCHRUN, "--standalone", "--nproc_per_node", "2"))
    assert code == 1 and "process 1 of 2: error: train.jsonl, line 7: not JSON\n" in output


@pytest.mark.distributed
def test_a_whole_run_over_two_processes_ends_in_one_message(tmp_path):
    """Rows that are too long are known once the base is there, on all processes."""
    config = "recipes/configs/retail/products.yaml"
    rows = "data.rows={train: 18, val: 3, test: 5}"
    done = subprocess.run(
        [sys.executable, "-m", "finetune.launch", config, rows, "data.max_length=3", f"train.output_dir={tmp_path}"],
        env=environment(NPROC="2"), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: 18 of 18 train rows are longer than 3 tokens") == 1
    assert "Traceback" not in done.stderr and "torch.distributed.elastic" not in done.stderr


@pytest.mark.distributed
def test_a_reader_that_leaves_ends_the_run_quietly(tmp_path):
    config = "recipes/configs/retail/products.yaml"
    rows = "data.rows={train: 18, val: 3, test: 5}"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "finetune.launch", config, rows, f"train.output_dir={tmp_path}"],
        env=environment(NPROC="2"), cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 141, done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr

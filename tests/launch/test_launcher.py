import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from finetune.errors import LaunchError, RecipeError
from finetune.launch import launcher as launch
from finetune.launch.hardware import Hardware

CPU = Hardware(kind="cpu", num_devices=1, why="no NVIDIA driver")
ONE_GPU = Hardware(kind="cuda", num_devices=1, why="listed by nvidia-smi")
FOUR_GPUS = Hardware(kind="cuda", num_devices=4, why="listed by nvidia-smi")
APPLE = Hardware(kind="mps", num_devices=1, why="Apple GPU")


@pytest.fixture(autouse=True)
def plain_env(monkeypatch):
    for name in (
        "NPROC",
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
        "ACCELERATE_USE_CPU",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with two recipes, and the current folder set elsewhere."""
    for name in ("medical/brain_mri", "retail/clothing"):
        path = tmp_path / "project" / "recipes" / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text("name: x\n")
    (tmp_path / "project" / "recipes" / "train.py").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(launch, "ROOT", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


@pytest.fixture
def ran(monkeypatch):
    """Collect what run_child was given instead of running it; set ``code`` for its answer."""

    class Ran(list):
        code = 0

        def __call__(self, command, *, env, cwd=None):
            self.append((command, env, cwd))
            return self.code

    calls = Ran()
    monkeypatch.setattr(launch, "run_child", calls)
    monkeypatch.setattr(launch, "find_hardware", lambda env: CPU)
    monkeypatch.setattr(launch, "_check_recipe", lambda config, args: None)
    monkeypatch.setattr(launch, "num_cores", lambda: 8)
    return calls


# The command line of a recipe


def test_one_process_on_a_cpu_goes_through_accelerate(project, ran):
    assert launch.main(["recipes/configs/medical/brain_mri.yaml", "train.seed=1"]) == 0
    [(command, _, cwd)] = ran
    assert command == [
        *(sys.executable, "-P", "-m", "finetune.launch.processes", "accelerate.commands.launch", "--quiet"),
        *("--config_file", str(project / "recipes/accelerate/cpu.yaml"), "--num_processes", "1"),
        str(project / "recipes/train.py"),
        *(str(project / "recipes/configs/medical/brain_mri.yaml"), "train.seed=1"),
    ]
    assert cwd is None  # paths on the command line stay relative to the user's folder


def test_two_processes_on_a_cpu_go_through_torchrun(project, ran, monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    assert launch.main(["recipes/configs/medical/brain_mri.yaml"]) == 0
    [(command, env, _)] = ran
    assert command == [
        *(sys.executable, "-P", "-m", "finetune.launch.processes"),
        *("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        str(project / "recipes/train.py"),
        str(project / "recipes/configs/medical/brain_mri.yaml"),
    ]
    assert env["ACCELERATE_USE_CPU"] == "true"
    assert env["FINETUNE_NUM_PROCESSES"] == "2"


@pytest.mark.parametrize(
    ("hardware", "nproc", "config", "started"),
    [
        (CPU, None, "cpu.yaml", 1),
        (APPLE, None, "single_gpu.yaml", 1),
        (ONE_GPU, None, "single_gpu.yaml", 1),
        (FOUR_GPUS, None, "ddp.yaml", 4),
        (FOUR_GPUS, "2", "ddp.yaml", 2),
        (FOUR_GPUS, "1", "single_gpu.yaml", 1),
    ],
)
def test_hardware_and_nproc_choose_the_accelerate_config(hardware, nproc, config, started, project, ran, monkeypatch):
    monkeypatch.setattr(launch, "find_hardware", lambda env: hardware)
    if nproc:
        monkeypatch.setenv("NPROC", nproc)
    assert launch.main(["recipes/configs/retail/clothing.yaml"]) == 0
    [(command, env, _)] = ran
    assert command[command.index("--config_file") + 1] == str(project / "recipes" / "accelerate" / config)
    assert command[command.index("--num_processes") + 1] == str(started)
    assert ("--main_process_port" in command) == (started > 1)
    assert env["FINETUNE_NUM_PROCESSES"] == str(started)
    assert env["OMP_NUM_THREADS"] == str(8 // started)
    assert env["GOMP_SPINCOUNT"] == "3000"
    assert ("ACCELERATE_USE_CPU" in env) == (hardware is CPU)


def test_a_number_of_threads_that_is_set_stays(project, ran, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launch.main(["recipes/configs/retail/clothing.yaml"])
    assert ran[0][1]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("nproc", ["0", "-1", "two", "1.5"])
def test_nproc_has_to_be_a_number(nproc, project, ran, monkeypatch, capsys):
    monkeypatch.setenv("NPROC", nproc)
    assert launch.main(["recipes/configs/retail/clothing.yaml"]) == 2
    assert (
        f"NPROC, the number of processes, must be a whole number of at least 1, got {nproc!r}"
        in capsys.readouterr().err
    )
    assert not ran


@pytest.mark.parametrize("hardware", [FOUR_GPUS, APPLE], ids=lambda hardware: hardware.kind)
def test_more_processes_than_gpus_are_refused(hardware):
    with pytest.raises(LaunchError, match=r"NPROC must be at most .*, got 5. .* ACCELERATE_USE_CPU=true"):
        launch.num_processes(hardware, 5)


def test_exit_code_is_the_childs(project, ran):
    ran.code = 7
    assert launch.main(["recipes/configs/retail/clothing.yaml"]) == 7


def test_bad_override_is_refused_before_anything_starts(project, monkeypatch, capsys):
    def refuse(config, overrides):
        assert overrides == ["trian.seed=1"]
        raise RecipeError("clothing.yaml: unknown key 'trian'")

    places = {"finetune.recipe:load_recipe": refuse, "finetune.preflight:check_recipe": None}
    monkeypatch.setattr(launch, "import_string", places.__getitem__)
    assert launch.main(["recipes/configs/retail/clothing.yaml", "--flag", "trian.seed=1"]) == 2
    assert capsys.readouterr().err == "error: clothing.yaml: unknown key 'trian'\n"


# Words and paths


def test_unknown_word_is_answered_with_the_near_one(capsys):
    assert launch.main(["tset"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: unknown command 'tset'. Did you mean 'test'? Allowed: demo, setup, test, ")
    assert output.out == ""


def test_missing_recipe_is_answered_with_near_ones(project, capsys):
    assert launch.main(["recipes/configs/medical/brian_mri.yaml"]) == 2
    assert "Did you mean 'recipes/configs/medical/brain_mri.yaml'?" in capsys.readouterr().err


def test_missing_recipe_with_no_near_one_lists_all(project, capsys):
    assert launch.main(["zzz.yaml"]) == 2
    listed = "Allowed: recipes/configs/medical/brain_mri.yaml, recipes/configs/retail/clothing.yaml."
    assert listed in capsys.readouterr().err


def test_recipe_in_the_current_folder_comes_first(project, monkeypatch):
    Path("mine.yaml").write_text("name: x\n")
    assert launch.find_config("mine.yaml") == Path("mine.yaml")
    name = "recipes/configs/retail/clothing.yaml"
    assert launch.find_config(name) == project / name
    monkeypatch.chdir(project)
    assert launch.find_config(name) == Path(name)


def test_folder_is_no_recipe(project):
    Path("configs").mkdir()
    with pytest.raises(LaunchError, match="It is a folder"):
        launch.find_config("configs")


def test_no_scripts_outside_a_checkout(project, ran, capsys):
    (project / "recipes" / "train.py").unlink()
    assert launch.main(["recipes/configs/retail/clothing.yaml"]) == 2
    assert "recipes run from a checkout of the project" in capsys.readouterr().err


def test_help_and_nothing(capsys):
    assert launch.main(["-h"]) == 0
    assert "CONFIG.yaml [key=value ...]" in capsys.readouterr().out
    assert launch.main([]) == 2


@pytest.mark.parametrize(("word", "code"), [("demo", 0), ("setup", 0), ("test", 0), ("tset", 2), ("a.yaml", 2)])
def test_check_needs_the_standard_library_only(word, code):
    # -S leaves out installed packages, as for a Python that nothing was installed for yet.
    command = [sys.executable, "-S", "-P", "-m", "finetune.launch", "--check", word]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(launch.ROOT)}, capture_output=True)
    assert done.returncode == code, done.stderr


def test_demo_is_the_commands(monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "import_string", {"finetune.cli:main": calls.append}.__getitem__)
    assert launch.main(["demo", "--json", "out.json"]) == 0
    assert calls == [["demo", "--json", "out.json"]]


# Tests


@pytest.mark.parametrize(
    ("args", "nproc", "options"),
    [
        ([], None, ["-n", "2", "--dist", "worksteal"]),
        ([], "4", ["-n", "4", "--dist", "worksteal"]),
        ([], "1", ["-n", "0"]),
        (["-n0", "-x"], None, ["-n0", "-x"]),
        (["-k", "launch"], None, ["-n", "2", "--dist", "worksteal", "-k", "launch"]),
    ],
)
def test_pytest_options(args, nproc, options, ran, monkeypatch):
    if nproc:
        monkeypatch.setenv("NPROC", nproc)
    monkeypatch.delenv("FINETUNE_TEST_ALL", raising=False)
    ran.code = 1
    assert launch.main(["test", *args]) == 1
    [(command, env, cwd)] = ran
    assert command == [sys.executable, "-m", "pytest", *options]
    assert cwd == launch.ROOT
    assert "FINETUNE_TEST_ALL" not in env


@pytest.mark.parametrize(("hardware", "selection"), [(CPU, "not gpu"), (APPLE, "not gpu"), (ONE_GPU, "")])
def test_all_leaves_out_only_what_needs_a_missing_gpu(hardware, selection, ran, monkeypatch):
    monkeypatch.setattr(launch, "find_hardware", lambda env: hardware)
    launch.main(["test", "--all", "-x"])
    [(command, env, _)] = ran
    assert command[3:] == ["-n", "2", "--dist", "worksteal", "-m", selection, "-x"]
    assert env["FINETUNE_TEST_ALL"] == "1"


@pytest.mark.parametrize(("name", "nproc"), [("cpu", 1), ("single_gpu", 1), ("ddp", 2)])
def test_accelerate_takes_its_config(name, nproc):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    hardware = Hardware(kind="cpu" if name == "cpu" else "cuda", num_devices=nproc, why="")
    command = launch.training_command(
        Path("a.yaml"), ["train.seed=1"], script=Path("t.py"), hardware=hardware, nproc=nproc
    )
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command[5:]))
    assert Path(args.config_file).name == f"{name}.yaml"
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (nproc, 1, "no")
    assert (args.use_cpu, args.multi_gpu) == (name == "cpu", name == "ddp")
    assert (args.training_script, args.training_script_args) == ("t.py", ["a.yaml", "train.seed=1"])


@pytest.mark.distributed
@pytest.mark.parametrize("nproc", [1, 2])
def test_as_many_processes_start_as_were_asked_for(nproc, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, sys
            import torch
            from accelerate import Accelerator

            accelerator = Accelerator()
            total = accelerator.reduce(torch.ones(1), reduction="sum")
            asked = os.environ["FINETUNE_NUM_PROCESSES"]
            words = [accelerator.num_processes, accelerator.device.type, int(total), asked, *sys.argv[1:]]
            path = pathlib.Path(__file__).parent / f"rank{accelerator.process_index}"
            path.write_text(" ".join(map(str, words)))
            accelerator.end_training()
            """
        )
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("NPROC", str(nproc))
    assert launch.train(Path("a.yaml"), ["train.seed=1"], script=script) == 0
    found = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    assert found == {f"rank{i}": f"{nproc} cpu {nproc} {nproc} a.yaml train.seed=1" for i in range(nproc)}

"""recipes/accelerate: accelerate and torchrun read every file as its header says."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune.errors import LaunchError
from finetune.launch import launcher as launch
from finetune.launch.hardware import Hardware

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "kubernetes")
# What accelerate makes of each: use_cpu, multi_gpu, use_fsdp, use_deepspeed.
KINDS = {
    "cpu": (True, False, False, False),
    "ddp": (False, True, False, False),
    "deepspeed_zero2": (False, False, False, True),
    "deepspeed_zero3": (False, False, False, True),
    "fsdp2": (False, False, True, False),
    "multi_node": (False, True, False, False),
    "single_gpu": (False, False, False, False),
}
GPUS = Hardware(kind="cuda", num_devices=4, why="listed by nvidia-smi")


def header(path):
    """The comment that a file begins with, as one text."""
    lines = path.read_text().split("\n")
    return "\n".join(line[1:].strip() for line in lines if line.startswith("#") and not line.startswith(("#!", "#SB")))


def commands(path):
    """The accelerate launch commands of a header, with what they set before."""
    text = header(path).replace("\\\n", " ").replace("\n  ", " ")
    return [shlex.split(found) for found in re.findall(r"^FINETUNE_NUM_PROCESSES.*accelerate launch.*$", text, re.M)]


def test_every_file_is_looked_at():
    assert sorted(KINDS) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_understands_the_command_of_the_header(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no", "the recipe's model.dtype says what is computed in"
    ((asked, *command),) = commands(path)
    command = [{"R": "1", "HOST": "10.0.0.1"}.get(word, word) for word in command[2:]]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert Path(args.config_file).name == path.name and args.training_script == "recipes/train.py"
    assert (args.use_cpu, args.multi_gpu, args.use_fsdp, args.use_deepspeed) == KINDS[name]
    assert asked == f"FINETUNE_NUM_PROCESSES={args.num_processes}", "what is asked for is what is checked"
    assert args.num_machines == (2 if name == "multi_node" else 1)
    if args.use_fsdp:
        assert (args.fsdp_version, args.fsdp_cpu_ram_efficient_loading) == (2, False)
    if args.use_deepspeed:
        assert (args.zero_stage, args.gradient_accumulation_steps) == (int(name[-1]), 1)


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_what_accelerate_hands_on_is_accepted_by_a_run(name, monkeypatch, make_recipe):
    """From the file to the environment of a process, and from there to accelerate's plugin, and to our strategy."""
    from types import SimpleNamespace

    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    from finetune.training.strategy import strategy_of

    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "--num_processes", "4", "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    args.deepspeed_fields_from_accelerate_config = ""  # as accelerate's own command fills it
    env = prepare_multi_gpu_env(args) if args.use_fsdp else prepare_deepspeed_cmd_env(args)[1]
    for key, value in env.items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    state = SimpleNamespace()
    kind = DistributedType.FSDP if args.use_fsdp else DistributedType.DEEPSPEED
    if args.use_fsdp:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    else:
        state.deepspeed_plugin = DeepSpeedPlugin()
    strategy = strategy_of(SimpleNamespace(distributed_type=kind, state=state), make_recipe("a"))
    assert type(strategy).__name__ == ("SplitBase" if args.use_fsdp else "DeepSpeed")


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_every_header_states_whether_it_was_run(path):
    assert re.search(r"\b[Nn]ot run\b|was not run|[Rr]un by the tests", header(path)), "say what was run, and what not"


# launch.sh


@pytest.mark.parametrize("strategy", launch.STRATEGIES)
def test_strategy_chooses_the_file(strategy):
    assert launch._strategy({"STRATEGY": strategy}, GPUS) == strategy
    command = launch.training_command(
        Path("a.yaml"), [], script=Path("t.py"), hardware=GPUS, nproc=4, strategy=strategy
    )
    assert command[command.index("--config_file") + 1] == str(FOLDER / f"{strategy}.yaml")
    assert command[command.index("--num_processes") + 1] == "4"


@pytest.mark.parametrize(
    ("strategy", "hardware", "message"),
    [
        ("fspd2", GPUS, "unknown STRATEGY 'fspd2'. Did you mean 'fsdp2'. Allowed: ddp, fsdp2, deepspeed_zero2"),
        (
            "fsdp2",
            Hardware(kind="cpu", num_devices=1, why="no NVIDIA driver"),
            "but the hardware found is cpu .no NVIDIA driver.",
        ),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(strategy, hardware, message):
    with pytest.raises(LaunchError, match=message):
        launch._strategy({"STRATEGY": strategy}, hardware)


# Several machines


def torchrun(words):
    """What torch.distributed.run makes of a command line."""
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(words[words.index("torch.distributed.run") + 1 :])


def test_slurm_starts_torchrun_on_every_machine(tmp_path):
    """Stand-ins for srun, scontrol and Python say what they were given."""
    for name, body in {
        "srun": 'exec "$@"',
        "scontrol": "echo node-a; echo node-b",
        "venv/bin/python": 'echo "$FINETUNE_NUM_PROCESSES" "$@"',
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FINETUNE_VENV": str(tmp_path / "venv"),
        "SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "a100:4", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sh"), "my.yaml", "train.seed=1"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    number, *words = done.stdout.split()
    args = torchrun(words)
    assert (number, args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("8", "2", "4", "c10d")
    assert (args.rdzv_endpoint, args.rdzv_id) == ("node-a:29500", "7")
    assert (args.training_script, args.training_script_args) == ("recipes/train.py", ["my.yaml", "train.seed=1"])


def test_the_numbers_of_the_kubernetes_job_agree():
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(env["NUM_MACHINES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(env["GPUS"])
    assert int(env["FINETUNE_NUM_PROCESSES"]) == int(env["NUM_MACHINES"]) * int(env["GPUS"])
    shell = f"echo {container['command'][2].removeprefix('exec ')}"
    done = subprocess.run(
        ["bash", "-c", shell], env={**env, "JOB_COMPLETION_INDEX": "1"}, capture_output=True, text=True
    )
    args = torchrun(done.stdout.split())
    assert (args.nnodes, args.nproc_per_node, args.node_rank, args.rdzv_backend) == ("2", "8", 1, "c10d")
    assert args.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:29500"
    assert service["spec"]["selector"] == {"job-name": name} and service["metadata"]["name"] == pod["subdomain"]
    assert Path(args.training_script_args[0]).suffix == ".yaml" and Path(args.training_script_args[0]).exists()


def train(*launcher, **env):
    root = FOLDER.parents[1]
    command = [sys.executable, *(("-m", *launcher) if launcher else ()), "recipes/train.py"]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **env}
    config = "recipes/configs/medical/phantoms.yaml"
    return subprocess.run([*command, config], env=env, cwd=root, capture_output=True, text=True, timeout=300)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launcher", "started"),
    [
        (("accelerate.commands.launch", "--cpu", "--num_processes", "2"), 1),
        (("accelerate.commands.launch", "--config_file", str(FOLDER / "cpu.yaml"), "--num_processes", "2"), 1),
    ],
)
def test_a_run_that_got_another_number_is_refused(launcher, started):
    done = train(*launcher, FINETUNE_NUM_PROCESSES="2")
    assert done.returncode != 0
    assert f"the launch must start 2 processes, but this run has {started}" in done.stderr


@pytest.mark.distributed
def test_a_shared_base_that_accelerate_would_not_share_is_refused():
    """It offers no FSDP on a CPU, and says nothing of it."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = train(*launcher, ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert done.returncode != 0
    assert "FSDP needs GPUs, but accelerate gives MULTI_CPU on cpu" in done.stderr


def test_deepspeed_that_is_not_installed_is_one_line():
    if importlib.util.find_spec("deepspeed"):
        pytest.skip("DeepSpeed is installed")
    done = train(ACCELERATE_USE_DEEPSPEED="true")
    assert done.returncode == 2 and "needs DeepSpeed, which is not installed. Install it with pip" in done.stderr

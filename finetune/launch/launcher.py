"""The commands of ``launch.sh``, which runs this module when the environment is ready.

::

    python -m finetune.launch setup                        versions, hardware, and where things are
    python -m finetune.launch demo [options]               the demo of the finetune command
    python -m finetune.launch test [--all] [pytest args]   the tests; --all adds the slow ones
    python -m finetune.launch CONFIG.yaml [key=value ...]  train a recipe on the hardware found

``NPROC`` sets the number of processes, ``STRATEGY`` how they share the work on GPUs, and ``ACCELERATE_USE_CPU=true``
keeps a recipe off the GPU.
The module needs only the standard library to start, so that ``launch.sh`` can check a command line (``--check``)
before anything is installed.
"""

import difflib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import LaunchError
from finetune.launch.child import run_child
from finetune.launch.command import exit_code_of
from finetune.launch.hardware import Hardware, find_hardware, num_cores
from finetune.launch.threads import waiting_env
from finetune.lookup import did_you_mean, import_string

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("demo", "setup", "test")
STRATEGIES = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")  # each a file in recipes/accelerate
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(4 * 1024**3),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
}
SHOWN_PACKAGES = ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; print an error of this package instead of raising it."""
    return exit_code_of(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def _dispatch(args: list[str]) -> int:
    only_check = args[:1] == ["--check"]
    if only_check:
        args = args[1:]
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if args else 2
    word, rest = args[0], args[1:]
    if word not in WORDS:
        config = find_config(word)
        if only_check:
            return 0
        _check_recipe(config, rest)
        return train(config, rest, script=_recipe_script("train.py"))
    if only_check:
        return 0
    if word == "demo":
        return int(import_string("finetune.cli:main")(["demo", *rest]) or 0)
    return run_tests(rest) if word == "test" else show_setup()


# The command line -----------------------------------------------------------------------------------


def find_config(text: str) -> Path:
    """Return the recipe file that ``text`` names, from the current folder or from the project's.

    Raises:
        LaunchError: there is no such file, or the word is no command; the message suggests a close name.
    """
    for path in (Path(text), ROOT / text):
        if path.is_file():
            return path
    if not text.endswith((".yaml", ".yml")):
        is_folder = " It is a folder; name a .yaml file in it." if Path(text).is_dir() else ""
        raise LaunchError(
            f"unknown command {text!r}.{is_folder}{did_you_mean(text, WORDS)} "
            f"Allowed: {', '.join(WORDS)}, or the path of a recipe, such as recipes/configs/.../NAME.yaml."
        )
    configs = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "recipes" / "configs").rglob("*.yaml"))
    by_name = {Path(config).stem: config for config in configs}
    close = [by_name[name] for name in difflib.get_close_matches(Path(text).stem, by_name, n=3)]
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Allowed: {', '.join(configs) or 'none'}."
    places = " or ".join(dict.fromkeys((str(Path.cwd()), str(ROOT))))
    raise LaunchError(f"no recipe file {text!r} in {places}. {hint}")


def _check_recipe(config: Path, args: Sequence[str]) -> None:
    """Refuse a recipe that cannot run before the launch, which takes seconds."""
    load_recipe = import_string("finetune.recipe:load_recipe")
    check_recipe = import_string("finetune.preflight:check_recipe")
    check_recipe(load_recipe(config, [arg for arg in args if not arg.startswith("-")]))


def _recipe_script(name: str) -> Path:
    script = ROOT / "recipes" / name
    if not script.is_file():
        raise LaunchError(
            f"{script} is missing: recipes run from a checkout of the project, "
            "not from an installed package alone. Start them with the checkout's ./launch.sh."
        )
    return script


def _nproc(env: Mapping[str, str]) -> int | None:
    text = env.get("NPROC", "").strip()
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise LaunchError(f"NPROC, the number of processes, must be a whole number of at least 1, got {text!r}.")
    return int(text)


def num_processes(hardware: Hardware, asked: int | None) -> int:
    """Return the number of processes to start: ``asked``, else one for each GPU, else one.

    Raises:
        LaunchError: ``asked`` is more than the number of GPUs.
    """
    if asked is None:
        return hardware.num_devices
    if hardware.kind != "cpu" and asked > hardware.num_devices:
        raise LaunchError(
            f"NPROC must be at most {hardware.num_devices}, one process for each visible GPU ({hardware.why}), got "
            f"{asked}. Use NPROC={hardware.num_devices} or less, "
            "or ACCELERATE_USE_CPU=true for processes on the CPU."
        )
    return asked


def _strategy(env: Mapping[str, str], hardware: Hardware) -> str | None:
    """Return the name of the accelerate config in ``STRATEGY``; None if it is not set.

    Raises:
        LaunchError: there is no such config, or there are no GPUs for it.
    """
    name = env.get("STRATEGY", "").strip()
    if not name:
        return None
    if name not in STRATEGIES:
        hint = did_you_mean(name, STRATEGIES)
        raise LaunchError(f"unknown STRATEGY {name!r}.{hint} Allowed: {', '.join(STRATEGIES)}.")
    if hardware.kind != "cuda":
        raise LaunchError(
            f"STRATEGY={name} needs NVIDIA GPUs, but the hardware found is {hardware.kind} ({hardware.why}). "
            "Leave STRATEGY out."
        )
    return name


# Running a command ----------------------------------------------------------------------------------


def training_command(
    config: Path, args: Sequence[str], *, script: Path, hardware: Hardware, nproc: int, strategy: str | None = None
) -> list[str]:
    """Return the command that trains ``config`` with ``nproc`` processes, sharing the work by ``strategy``.

    Accelerate starts a single process on a CPU for any number, so torch.distributed.run starts several.
    """
    # -P: import no module from the current folder. finetune.launch.processes shows each error of the processes once.
    python = [sys.executable, "-P", "-m", "finetune.launch.processes"]
    if hardware.kind == "cpu" and nproc > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    else:
        name = strategy or ("cpu" if hardware.kind == "cpu" else "ddp" if nproc > 1 else "single_gpu")
        file = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
        # --quiet: without it the launcher's traceback follows the message of a failed recipe.
        launcher = ["accelerate.commands.launch", "--quiet", "--config_file", str(file)]
        launcher += ["--num_processes", str(nproc)]
        if nproc > 1:
            launcher += ["--main_process_port", "0"]  # a free port: two runs may share a machine
    return [*python, *launcher, str(script), str(config), *args]


def training_env(env: Mapping[str, str], *, hardware: Hardware, nproc: int) -> dict[str, str]:
    """Return the environment for :func:`training_command`.

    ``FINETUNE_NUM_PROCESSES`` gives the training code the number of processes that the user asked for. Without it,
    processes that fail to find each other would each train alone, unnoticed.
    """
    new = dict(env)
    new["FINETUNE_NUM_PROCESSES"] = str(nproc)
    new.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // nproc)))
    new |= waiting_env(env)
    if hardware.kind == "cpu":
        # glibc returns large buffers to the system after every operation and allocates them again. Kept buffers
        # save most of the time that a training step spends in the kernel. Other C libraries ignore these variables.
        for name, value in KEEP_MEMORY.items():
            new.setdefault(name, value)
    if hardware.kind == "cpu":
        new["ACCELERATE_USE_CPU"] = "true"
    return new


def train(config: Path, args: Sequence[str], *, script: Path) -> int:
    """Train ``config`` with ``script`` on the hardware found, and return the exit code."""
    hardware = find_hardware(os.environ)
    nproc = num_processes(hardware, _nproc(os.environ))
    strategy = _strategy(os.environ, hardware)
    command = training_command(config, args, script=script, hardware=hardware, nproc=nproc, strategy=strategy)
    _log(f"on {hardware.kind} ({hardware.why}), processes: {nproc}")
    _log(shlex.join(command))
    return run_child(command, env=training_env(os.environ, hardware=hardware, nproc=nproc))


def run_tests(args: Sequence[str]) -> int:
    """Run pytest in the project's folder, and return its exit code."""
    env = dict(os.environ)
    nproc = _nproc(env) or min(2, num_cores())
    options: list[str] = []
    if not _chooses_workers(args):
        # Each worker begins with a run of neighbours, so that few fixtures are made twice.
        options = ["-n", str(nproc), "--dist", "worksteal"] if nproc > 1 else ["-n", "0"]
    if "--all" in args:
        args = [arg for arg in args if arg != "--all"]
        env["FINETUNE_TEST_ALL"] = "1"
        # This -m replaces the one of pyproject.toml, which excludes the slow tests.
        options += ["-m", "" if find_hardware(env).kind == "cuda" else "not gpu"]
    env.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // nproc)))
    return run_child([sys.executable, "-m", "pytest", *options, *args], env=env, cwd=ROOT)


def _chooses_workers(args: Sequence[str]) -> bool:
    return any(re.match(r"-n($|\d|auto|logical)|--numprocesses", arg) for arg in args)


def show_setup() -> int:
    """Print versions, the hardware and the folders; return 0 if torch imports."""
    hardware = find_hardware(os.environ)
    print(f"Python {platform.python_version()} in {sys.prefix}")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN_PACKAGES))
    try:
        torch: Any = importlib.import_module("torch")
        importlib.import_module("torchvision")
    except Exception as error:  # a broken native library raises OSError, a mismatched one RuntimeError
        raise LaunchError(
            f"torch or torchvision does not import: {error}. Delete {sys.prefix} and run ./launch.sh setup again."
        ) from error
    print(f"hardware: {_describe(hardware, torch)}")
    nproc = num_processes(hardware, _nproc(os.environ))
    print(f"processes that a recipe trains with here: {nproc} (NPROC changes it)")
    print(f"recipes: {ROOT / 'recipes' / 'configs'}")
    print(f"log of the install: {Path(sys.prefix) / 'install.log'}")
    print("next: ./launch.sh demo, ./launch.sh test, or ./launch.sh recipes/configs/.../NAME.yaml")
    return 0


def _describe(hardware: Hardware, torch: Any) -> str:
    if hardware.kind == "cuda":
        if not torch.cuda.is_available():
            return (
                f"{hardware.num_devices} GPU {hardware.why}, but torch cannot use it. "
                f"Check that the driver supports CUDA {torch.version.cuda}. "
                "ACCELERATE_USE_CPU=true trains on the CPU until then."
            )
        names = [torch.cuda.get_device_name(i) for i in range(hardware.num_devices)]
        return f"{hardware.num_devices} GPU: {', '.join(names)}"
    if hardware.kind == "mps":
        return "Apple GPU (ACCELERATE_USE_CPU=true trains on the CPU instead)"
    return f"CPU, {num_cores()} cores ({hardware.why})"


def _log(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)

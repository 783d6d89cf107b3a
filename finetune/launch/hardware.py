"""The hardware of this machine, found without importing torch where possible."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import LaunchError
from finetune.lookup import import_string

NVIDIA_DEVICE_FILES = ("nvidia0", "nvhost-gpu", "nvmap", "dxg")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The devices that a recipe can be trained on here.

    Attributes:
        kind: the kind of device: ``"cpu"``, ``"cuda"`` (also AMD's, as torch calls it) or ``"mps"`` (Apple).
        num_devices: the number of devices of that kind; 1 for a CPU.
        why: the evidence for the kind and number, for people.
    """

    kind: str
    num_devices: int
    why: str


def find_hardware(env: Mapping[str, str]) -> Hardware:
    """Find the GPUs that torch will see, without importing torch where possible."""
    if env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return Hardware(kind="cpu", num_devices=1, why="ACCELERATE_USE_CPU asks for it")
    build = _torch_build()
    if build == "hip":
        return _gpus_by_torch(env)
    if build == "cuda":
        return _nvidia_gpus(env)
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Hardware(kind="mps", num_devices=1, why="Apple GPU")
    return Hardware(kind="cpu", num_devices=1, why="this torch is built for the CPU only")


def _torch_build() -> str:
    """Return ``"cuda"``, ``"hip"`` or ``"cpu"``, read from torch's version file: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise LaunchError(f"torch must be installed for {sys.executable}, but it is not. Run ./launch.sh setup.")
    text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    for build in ("hip", "cuda"):
        if re.search(rf"^{build}\b[^=\n]*=\s*['\"]", text, re.MULTILINE):
            return build
    return "cpu"


def _nvidia_gpus(env: Mapping[str, str]) -> Hardware:
    listing = _nvidia_smi()
    if listing is None:
        if any(os.path.exists(f"/dev/{name}") for name in NVIDIA_DEVICE_FILES):
            return _gpus_by_torch(env)  # a driver without its tool: Jetson, some containers
        return Hardware(kind="cpu", num_devices=1, why="no NVIDIA driver")
    if "MIG " in listing:  # only CUDA knows which slices a process sees
        return _gpus_by_torch(env)
    count = _count_visible(listing, env.get("CUDA_VISIBLE_DEVICES"))
    if count == 0:
        why = "CUDA_VISIBLE_DEVICES hides every GPU" if "GPU " in listing else "nvidia-smi lists no GPU"
        return Hardware(kind="cpu", num_devices=1, why=why)
    return Hardware(kind="cuda", num_devices=count, why="listed by nvidia-smi")


def _nvidia_smi() -> str | None:
    """Return the output of ``nvidia-smi -L``; None if the tool is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _count_visible(listing: str, visible: str | None) -> int:
    """Return how many listed GPUs ``CUDA_VISIBLE_DEVICES`` leaves; like CUDA, stop at the first invalid entry."""
    uuids = re.findall(r"^GPU \d+:.*\(UUID: (\S+)\)", listing, re.MULTILINE)
    if visible is None:
        return len(uuids)
    count = 0
    for entry in (part.strip() for part in visible.split(",")):
        by_number = entry.isdigit() and int(entry) < len(uuids)
        by_uuid = entry.startswith("GPU-") and any(uuid.startswith(entry) for uuid in uuids)
        if not by_number and not by_uuid:
            break
        count += 1
    return count


def _gpus_by_torch(env: Mapping[str, str]) -> Hardware:
    """Ask torch, in a process of its own: the launcher stays small while the recipe runs."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], env=dict(env), capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LaunchError(
            f"torch must import in {sys.executable}, but it does not: {last}. "
            "Delete the environment and run ./launch.sh setup."
        )
    count = int(done.stdout.split()[-1])
    if count == 0:
        return Hardware(kind="cpu", num_devices=1, why="torch finds no GPU")
    return Hardware(kind="cuda", num_devices=count, why="counted by torch")


def num_cores() -> int:
    """Return the number of CPU cores that this process may use; hyperthreads of one core count once."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        physical = import_string("psutil:cpu_count")(logical=False)
    except ImportError:
        physical = None
    return max(1, min(allowed, physical or allowed))

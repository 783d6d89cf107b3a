"""What there is to run on: counted as CUDA does, and asked of torch only where nothing else settles it."""

import importlib.util
import os
import subprocess
from importlib.machinery import ModuleSpec

import pytest

from finetune.errors import LaunchError
from finetune.launch import hardware
from finetune.launch.hardware import Hardware

TWO_LISTED = """\
GPU 0: NVIDIA H200 (UUID: GPU-1a6f0c5e-0000-1111-2222-333344445555)
GPU 1: NVIDIA H200 (UUID: GPU-9bd81f22-0000-1111-2222-333344445555)
"""
MIG_LISTED = """\
GPU 0: NVIDIA H200 (UUID: GPU-1a6f0c5e-0000-1111-2222-333344445555)
  MIG 1g.18gb     Device  0: (UUID: MIG-6f7b1f0c-0000-1111-2222-333344445555)
"""


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("1", 1),
        ("1, 0", 2),
        ("0,7", 1),
        ("0,-1,1", 1),
        ("GPU-9bd81f22", 1),
        ("GPU-ffffffff", 0),
    ],
)
def test_visible_gpus_are_counted_as_cuda_does(visible, count, monkeypatch):
    monkeypatch.setattr(hardware, "_torch_build", lambda: "cuda")
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda: TWO_LISTED)
    found = hardware.find_hardware({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert (found.kind, found.num_devices) == (("cuda", count) if count else ("cpu", 1))
    if count == 0:
        assert found.why == "CUDA_VISIBLE_DEVICES hides every GPU"


def test_cpu_when_asked_for_although_there_are_gpus(monkeypatch):
    monkeypatch.setattr(hardware, "_torch_build", lambda: "cuda")
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda: TWO_LISTED)
    assert hardware.find_hardware({"ACCELERATE_USE_CPU": "true"}).kind == "cpu"


def test_cpu_when_torch_is_built_for_it_although_there_are_gpus(monkeypatch):
    monkeypatch.setattr(hardware, "_torch_build", lambda: "cpu")
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda: TWO_LISTED)
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    found = hardware.find_hardware({})
    assert (found.kind, found.why) == ("cpu", "this torch is built for the CPU only")


@pytest.mark.parametrize(("machine", "kind"), [("arm64", "mps"), ("x86_64", "cpu")])
def test_apple(machine, kind, monkeypatch):
    monkeypatch.setattr(hardware, "_torch_build", lambda: "cpu")
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    assert hardware.find_hardware({}).kind == kind


@pytest.mark.parametrize(
    ("build", "listing", "files"),
    [("hip", None, ()), ("cuda", MIG_LISTED, ()), ("cuda", None, (os.path.basename(os.devnull),))],
    ids=["amd", "slices of a GPU", "driver without nvidia-smi"],
)
def test_torch_is_asked_where_nvidia_smi_does_not_settle_it(build, listing, files, monkeypatch):
    asked = subprocess.CompletedProcess([], 0, stdout="some library's greeting\n3\n")
    monkeypatch.setattr(hardware, "_torch_build", lambda: build)
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda: listing)
    monkeypatch.setattr(hardware, "NVIDIA_DEVICE_FILES", files)
    monkeypatch.setattr(hardware.subprocess, "run", lambda *args, **options: asked)
    assert hardware.find_hardware({}) == Hardware(kind="cuda", num_devices=3, why="counted by torch")


def test_no_driver(monkeypatch):
    monkeypatch.setattr(hardware, "_torch_build", lambda: "cuda")
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    monkeypatch.setattr(hardware, "NVIDIA_DEVICE_FILES", ())
    assert hardware.find_hardware({}) == Hardware(kind="cpu", num_devices=1, why="no NVIDIA driver")


@pytest.mark.parametrize(
    ("line", "build"),
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None", "cuda"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '7.0'", "hip"),
        ("cuda = '12.8'\nhip = None", "cuda"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None", "cpu"),
    ],
)
def test_build_of_torch_is_read_from_its_version_file(line, build, tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text(f"__version__ = '2.14.1+cu130'\n{line}\n")
    spec = ModuleSpec("torch", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert hardware._torch_build() == build


def test_the_error_of_missing_torch_names_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"torch must be installed for .*, but it is not. Run \./launch\.sh setup"):
        hardware.find_hardware({})

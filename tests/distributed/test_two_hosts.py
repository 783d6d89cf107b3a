"""Two hosts: network namespaces with an address each, which reach one another by a cable and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.distributed.conftest import ROOT, WORKER, environment, results
from tests.matrix import LORA

pytestmark = pytest.mark.distributed
ADDRESSES = ("10.203.113.1", "10.203.113.2")


def ip(*args):
    return subprocess.run(["ip", *args], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts():
    """The names of two namespaces, ``ADDRESSES`` being theirs."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip: apt-get install iproute2")
    names = [f"finetune-{os.getpid()}-{i}" for i in (0, 1)]
    with ExitStack() as stack:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"this machine permits no network namespaces: {error.stderr.strip()}")
            stack.callback(ip, "netns", "del", name)
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names


def test_two_hosts_train_the_same_adapter_as_one(hosts, processes, bases, tmp_path):
    """Steps of 8 of 11 rows, and 5 rows to answer; once with the base whole on each host, and once shared."""
    common = {"base": bases("idefics3"), "method": LORA, "rows": 11, "uneven": True, "steps": 3, "answers": 5}
    ((whole,),) = processes([{**common, "batch_size": 8}], 1)
    split = {**common, "batch_size": 2, "accumulation": 2}
    scenarios = [split, {**split, "strategy": "fsdp2"}]
    (tmp_path / "scenarios.json").write_text(json.dumps(scenarios))
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
             "--nnodes", "2", "--nproc_per_node", "1", "--local_addr", address, "--rdzv_backend", "c10d",
             "--rdzv_endpoint", f"{ADDRESSES[0]}:29500", "--rdzv_id", "test", "--rdzv_conf", f"is_host={int(not rank)}",
             str(WORKER), str(tmp_path / "scenarios.json"), str(tmp_path)],
            # The hosts' own name is that of neither: gloo is told which way to take.
            env=environment(GLOO_SOCKET_IFNAME="cable"), cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, (name, address) in enumerate(zip(hosts, ADDRESSES, strict=True))
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-4000:] for text in outputs)
    for rank in (0, 1):
        for found in results(tmp_path, len(scenarios), rank):
            assert found["answers"] == whole["answers"]
            worst = max((found["weights"][name] - tensor).abs().max() for name, tensor in whole["weights"].items())
            assert worst < 1e-5

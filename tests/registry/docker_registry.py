"""Servers on loopback that tests start, each a process of its own with a folder of its own."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest


def program(name: str, package: str) -> str:
    """Returns the path of a server; without it the test is skipped, or fails where servers are required."""
    path = shutil.which(name) or shutil.which(name, path="/usr/bin:/usr/sbin")
    if path is None:
        reason = f"needs {name}: apt-get install {package}"
        if os.environ.get("FINETUNE_REQUIRE_SERVERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextmanager
def docker_registry(folder: Path, **auth: str):
    """Runs Debian's docker-registry; yields its host. With ``htpasswd=TEXT`` it asks for a password."""
    port = free_port()
    folder.mkdir()
    config = (
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\nhttp:\n  addr: 127.0.0.1:{port}\n"
    )
    if auth:
        (folder / "htpasswd").write_text(auth["htpasswd"])
        config += f"auth:\n  htpasswd:\n    realm: test\n    path: {folder}/htpasswd\n"
    (folder / "config.yml").write_text(config)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [program("docker-registry", "docker-registry"), "serve", str(folder / "config.yml")],
            stdout=log,
            stderr=log,
            env={"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"},
        )
    try:
        for _ in range(200):
            with socket.socket() as connecting:
                if connecting.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()

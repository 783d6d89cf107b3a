"""Debian's docker-registry, which is the reference implementation of OCI registries: a real server on loopback."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_SECONDS = 60


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def docker_registry(folder: Path, *, htpasswd: str | None = None) -> Iterator[str]:
    """Run a server that keeps everything below a new folder; yield its host.

    Args:
        folder: where.
        htpasswd: the allowed users, as lines of ``user:bcrypt``; None for all.

    Where it is not installed the test is skipped, or fails when FINETUNE_REQUIRE_SERVERS is 1.
    """
    program = shutil.which("docker-registry")
    if program is None:
        lacks = pytest.fail if os.environ.get("FINETUNE_REQUIRE_SERVERS") == "1" else pytest.skip
        lacks("no docker-registry: run tests/servers/install_docker_registry.sh, which needs apt-get and root")
    port = free_port()
    folder.mkdir()
    lines = [
        "version: 0.1",
        f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}",
        f"http: {{addr: 127.0.0.1:{port}}}",
    ]
    if htpasswd is not None:
        (folder / "htpasswd").write_text(htpasswd)
        lines.append(f"auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}")
    (folder / "config.yml").write_text("\n".join(lines) + "\n")
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        with socket.socket() as trying:
            while trying.connect_ex(("127.0.0.1", port)) != 0:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"docker-registry did not start: {(folder / 'log').read_text()}")
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()

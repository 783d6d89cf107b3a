"""Azurite, the storage emulator that Azure's own makers keep: a real server on loopback, in memory.

``tests/servers/install_azurite.sh`` puts it into ``.servers/``.
"""

import base64
import contextlib
import hashlib
import hmac
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".servers"
MAIN = FOLDER / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
# The same for every emulator, and printed in its documentation.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
START_SECONDS = 60


class Absent(Exception):
    """There is no Azurite here."""


@contextlib.contextmanager
def azurite(container: str, log: Path) -> Iterator[dict[str, str]]:
    """Run a server with one empty container; yield the environment by which obstore finds it.

    Raises:
        Absent: it is not installed.
    """
    node = shutil.which("node")
    if node is None or not MAIN.exists():
        raise Absent(f"no Azurite in {FOLDER}: run tests/servers/install_azurite.sh, which needs node and npm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    quiet = ["--disableTelemetry", "--silent", "--skipApiVersionCheck"]
    with open(log, "wb") as out:
        server = subprocess.Popen([node, str(MAIN), *options, *quiet], stdout=out, stderr=out, cwd=log.parent)
    try:
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        _make_container(endpoint, container, server, log)
        yield {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_ENDPOINT": endpoint,
            "AZURE_ALLOW_HTTP": "true",
        }
    finally:
        server.terminate()
        server.wait()


def _make_container(endpoint: str, name: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the server, too."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(_signed(endpoint, name), timeout=10).close()
            return
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Azurite did not start ({error}): {log.read_text()}") from error
            time.sleep(0.05)


def _signed(endpoint: str, name: str) -> urllib.request.Request:
    """Return the request that makes a container, signed with the account's key ("Shared Key" of Azure's REST API)."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    shown = "".join(f"{header}:{value}\n" for header, value in headers.items())
    resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    text = "PUT" + "\n" * 12 + shown + resource
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
    return urllib.request.Request(f"{endpoint}/{name}?restype=container", method="PUT", headers=headers)

"""``finetune app`` as its users have it: the command in a process of its own, and a real browser before it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

START_SECONDS = 120
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# The command, with a note of every host outside this machine that it asks for or connects to.
_COMMAND = """
import os, sys
def watch(event, args):
    where = args[1] if event == "socket.connect" else args if event == "socket.getaddrinfo" else None
    if isinstance(where, tuple) and where[0] not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None):
        with open(os.environ["FINETUNE_WATCHED"], "a") as file:
            print(event, where, file=file)
sys.addaudithook(watch)
from finetune.cli import main
sys.exit(main())
"""


@dataclass
class App:
    """A running ``finetune app``."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    watched: Path

    def outside(self) -> str:
        """Every host outside this machine that the process asked for."""
        return self.watched.read_text() if self.watched.exists() else ""

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Send a signal, waits, and return the exit code."""
        self.process.send_signal(signum)
        return self.process.wait(timeout=60)


@contextmanager
def running_app(words: list[str], folder: Path, *, cwd: Path | None = None) -> Iterator[App]:
    """Run the command on a free port; ``words`` are what follows ``finetune app``.

    Args:
        words: of the command line.
        folder: for its output, and for its temporary files.
        cwd: where it runs.
    """
    (folder / "tmp").mkdir(parents=True)
    app = App("", None, folder / "log", folder / "watched")  # type: ignore[arg-type]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "FINETUNE_WATCHED": str(app.watched),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    with open(app.log, "wb") as log:
        command = [sys.executable, "-c", _COMMAND, "app", *words, "--port", "0"]
        app.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=cwd)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"^(http://\S+)", app.log.read_text(), re.MULTILINE)):
            assert app.process.poll() is None and time.monotonic() < deadline, app.log.read_text()
            time.sleep(0.05)
        app.url = found[1]
        yield app
    finally:
        if app.process.poll() is None:
            app.process.kill()
        app.process.wait()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser; where there is none the test is skipped, or fails when FINETUNE_REQUIRE_SERVERS is 1."""
    program = shutil.which("chromium")
    if program is None:
        lacks = pytest.fail if os.environ.get("FINETUNE_REQUIRE_SERVERS") == "1" else pytest.skip
        lacks("no Chromium: run tests/servers/install_chromium.sh, which needs apt-get and root")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Visit:
    """An open page, and its requests and errors."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)  # on the console, or thrown
    outside: list[str] = field(default_factory=list)  # requests to anywhere else

    def shown(self, selector: str) -> str:
        """The text of an element, on one line."""
        return " ".join(self.page.locator(selector).inner_text().split())

    def boxes(self) -> dict[str, Locator]:
        """What can be chosen, by name."""
        return {box.inner_text().strip(): box.locator("input") for box in self.page.locator("#adapters label").all()}

    def choose(self, *names: str) -> None:
        """Chooses these adapters, and no other."""
        for name, box in self.boxes().items():
            box.set_checked(name in names)

    def upload(self, path: Path) -> None:
        """Give an image, in the place of one that is there."""
        if self.page.get_by_label("Remove Image").count():
            self.page.get_by_label("Remove Image").click()
        self.page.locator("#image input[type=file]").set_input_files(path)
        self.page.locator("#image img").wait_for()

    def ask(self, question: str) -> dict[str, str]:
        """Ask, and return each card's text by the name on it; an empty dict where an error is shown."""
        self.page.locator("#question textarea, #question input").fill(question)
        self.page.evaluate(
            "() => document.querySelectorAll('#answers .prose > *').forEach(e => { e.dataset.old = 1; })"
        )
        self.page.locator("#ask").click()
        self.page.wait_for_function(
            """() => {
              const now = document.querySelector("#answers .pg-cards, #answers .pg-alert");
              return now && !now.dataset.old && !now.querySelector(".waiting");
            }"""
        )
        cards = self.page.locator("#answers .pg-card").all()
        return {card.locator(".pg-who").inner_text().split()[0]: " ".join(card.inner_text().split()) for card in cards}


@contextmanager
def visit(browser: Browser, url: str, *, width: int = 1200, height: int = 900, scheme: str = "light"):
    """Open the page as a screen of this size shows it."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    seen = Visit(context.new_page(), url)
    seen.page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
    seen.page.on(
        "request",
        lambda request: (
            None if request.url.startswith((f"{url}/", "data:", "blob:")) else seen.outside.append(request.url)
        ),
    )
    seen.page.set_default_timeout(20_000)  # milliseconds
    seen.page.goto(url)
    seen.page.locator("#adapters label").first.wait_for()
    seen.page.wait_for_timeout(500)  # until the page has looked at the registry, which sets the boxes again
    yield seen
    context.close()

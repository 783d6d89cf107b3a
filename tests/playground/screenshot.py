"""docs/app.png: the page with the adapters of the demo.

finetune demo --output-dir runs/demo && python -m tests.playground.screenshot runs/demo/registry
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.playground.browser import chromium, running_app, visit

FILE = Path(__file__).parents[2] / "docs" / "app.png"
EXAMPLE = "How many cells are there?"


def main(registry: str) -> None:
    """Take the image."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_app(["--base", "pocket", "--registry", registry], Path(folder) / "app") as app,
        chromium() as browser,
        visit(browser, app.url, width=1180, height=800) as seen,
    ):
        seen.page.get_by_role("button", name=EXAMPLE).click()
        seen.page.locator("#image img.small").wait_for()
        seen.ask(EXAMPLE)
        seen.ask(EXAMPLE)  # switched, not loaded
        seen.page.mouse.move(0, 0)
        seen.page.screenshot(path=FILE, full_page=True)
    # Six bits a colour look the same and pack better; grey stays grey, as it would not in a palette.
    Image.open(FILE).convert("RGB").point(lambda value: value & 0xFC | value >> 6).save(FILE, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])

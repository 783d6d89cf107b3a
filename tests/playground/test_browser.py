"""The page in a real browser: an image goes in, the answers stand side by side, and nothing leaves this machine.

FINETUNE_SCREENSHOTS names a folder that keeps what was seen.
"""

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.adapters.manifest import MANIFEST_NAME, AdapterManifest
from finetune.pocket.retail import draw_product
from finetune.recipe import load_recipe
from finetune.registry import AdapterRegistry
from tests.playground.browser import chromium, running_app, visit
from tests.playground.conftest import altered

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MEDICAL, RETAIL = "medical/phantoms", "retail/products"
QUESTION = "Which garment is this?"


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    """What is started once for all of these tests has no part in the user's directories either."""
    folder = tmp_path_factory.mktemp("places")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("FINETUNE_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(scope="module")
def trained(places, tmp_path_factory):
    """A registry with two adapters that had twenty steps, one of another base, and one that does something else."""
    from finetune.runs.train import train

    folder = tmp_path_factory.mktemp("trained")
    registry = AdapterRegistry(folder / "runs" / "demo" / "registry")
    small = [
        "data.rows={train: 320, test: 40}",
        "train.batch_size=16",
        "train.epochs=1",
        f"train.output_dir={folder}/runs",
    ]
    for config in (f"{MEDICAL}.yaml", f"{RETAIL}.yaml"):
        run = train(load_recipe(ROOT / "recipes" / "configs" / config, small), registry=registry)
    registry.publish(altered(run.adapter, folder / "foreign", name="foreign", base_config="0" * 64))
    probe = AdapterManifest.parse((run.adapter / MANIFEST_NAME).read_bytes()).probe
    wrong = probe.model_copy(update={"adapter": [[value + 9 for value in row] for row in probe.adapter]})
    registry.publish(altered(run.adapter, folder / "other", name="other-effect", probe=wrong))
    return folder, registry


def documented():
    """What follows ``finetune app`` in each command of docs/."""
    page = (ROOT / "docs" / "app.md").read_text(encoding="utf-8")
    return [words.split() for words in re.findall(r"^finetune app (.*)$", page, re.MULTILINE)]


@pytest.fixture(scope="module")
def app(trained, tmp_path_factory):
    """The first command of docs/, as it stands there."""
    with running_app(documented()[0], tmp_path_factory.mktemp("app"), cwd=trained[0]) as running:
        yield running
        assert running.outside() == "", "the server spoke with another machine"


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def keep(tmp_path):
    """Return a function that keeps a screenshot of the whole page."""
    folder = Path(os.environ.get("FINETUNE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return lambda seen, name: seen.page.screenshot(path=folder / f"{name}.png", full_page=True)


@pytest.fixture
def product(tmp_path):
    """An image that is none of the examples, its answer in the words of the retail adapter."""
    Image.fromarray(draw_product(0, "test", 3).image).save(tmp_path / "product.png")
    return tmp_path / "product.png"


def answered(card):
    """What a card says beside its times, which differ."""
    return re.sub(r"(loaded and checked|switched|answered) in [\d.]+ m?s", "", card).split()


def test_upload_ask_and_switch(app, browser, trained, product, keep):
    from finetune.serving.loading import load

    vlm, expected = load("base", base="pocket", registry=trained[1]), {}
    for ref in (None, MEDICAL, RETAIL):
        with vlm.using(ref):
            expected[ref] = vlm.ask(product, QUESTION)
    assert expected[RETAIL] not in (expected[None], expected[MEDICAL]), (
        f"the few steps taught too little to tell: {expected}"
    )
    with visit(browser, app.url) as seen:
        keep(seen, "desktop-empty")
        seen.upload(product)
        seen.choose(MEDICAL)
        first = seen.ask(QUESTION)
        assert first.keys() == {"base", MEDICAL}
        assert f"no adapter {expected[None]} answered in" in first["base"]
        compared = "same as" if expected[MEDICAL] == expected[None] else "differs from"
        assert f"version 1 {expected[MEDICAL]} {compared} the base loaded and checked in" in first[MEDICAL]
        seen.choose(RETAIL)
        second = seen.ask(QUESTION)
        assert second.keys() == {"base", RETAIL}
        assert f"version 1 {expected[RETAIL]} differs from the base" in second[RETAIL]
        seen.choose(MEDICAL, RETAIL)
        both = seen.ask(QUESTION)
        assert [answered(both[name]) for name in ("base", MEDICAL)] == [answered(first[name]) for name in first]
        assert answered(both[RETAIL]) == answered(second[RETAIL])
        assert all("switched in" in both[name] for name in (MEDICAL, RETAIL)), "both are loaded by now"
        keep(seen, "desktop")
        assert (seen.errors, seen.outside) == ([], [])


def test_an_example_brings_its_question_and_the_right_answer(app, browser):
    with visit(browser, app.url) as seen:
        seen.page.get_by_role("button", name="medical: How many cells are there?").click()
        seen.page.locator("#image img").wait_for()
        question = seen.page.locator("#question textarea, #question input")
        seen.page.wait_for_function("() => document.querySelector('#question textarea, #question input').value !== ''")
        assert question.input_value() == "How many cells are there?"
        seen.page.wait_for_function("() => document.querySelector('#image img').classList.contains('small')")
        seen.choose(MEDICAL, RETAIL)
        cards = seen.ask("How many cells are there?")
        assert seen.shown("#answers .pg-right").endswith("four")
        assert all("right" in card or "wrong" in card for card in cards.values()) and len(cards) == 3
        assert "right" not in str(seen.ask("How many hats are there?")), "the right answer is not known"
        assert (seen.errors, seen.outside) == ([], [])


def test_the_table_shows_what_cannot_be_chosen_and_why(app, browser):
    with visit(browser, app.url) as seen:
        assert list(seen.boxes()) == [MEDICAL, "retail/other-effect", RETAIL]
        rows = {row.locator(".pg-name").inner_text(): row for row in seen.page.locator(".pg-table tbody tr").all()}
        assert rows.keys() >= {MEDICAL, RETAIL, "retail/foreign", "retail/other-effect"}
        assert "cannot be chosen" in rows["retail/foreign"].inner_text()
        assert "trained on another base: someone/other-base" in rows["retail/foreign"].inner_text()
        assert (
            re.search(r"0\.\d{3} → 0\.\d{3}", rows[MEDICAL].inner_text())
            and "40 test rows" in rows[MEDICAL].inner_text()
        )
        assert "synthetic" in rows[MEDICAL].inner_text() and "not signed" in rows[MEDICAL].inner_text()
        assert "Not for diagnosis." in seen.shown(".pg-foot")


def test_an_error_is_shown_and_the_page_continues(app, browser, product, tmp_path):
    (tmp_path / "broken.png").write_bytes(product.read_bytes()[:200])
    with visit(browser, app.url) as seen:
        assert seen.ask("Is it?") == {}
        assert "There is no image yet" in seen.shown("#answers [role=alert]")
        seen.upload(tmp_path / "broken.png")
        assert seen.ask("Is it?") == {}
        assert "broken.png: not a readable image" in seen.shown("#answers [role=alert]")
        seen.upload(product)
        assert seen.ask("   ") == {}
        assert "The question is empty" in seen.shown("#answers [role=alert]")
        seen.choose("retail/other-effect", RETAIL)
        cards = seen.ask(QUESTION)
        assert (
            "No answer. the adapter must have the effect that it had when it was saved" in cards["retail/other-effect"]
        )
        assert "answered in" in cards["base"] and "answered in" in cards[RETAIL]
        assert "Traceback" not in app.log.read_text()


def test_a_new_version_is_seen_without_a_restart(app, browser, trained, product):
    folder, registry = trained
    with visit(browser, app.url) as seen:
        seen.upload(product)
        seen.choose(RETAIL)
        registry.publish(altered(folder / "foreign", folder / "newer", name="newer"))
        seen.page.locator("#again").click()
        seen.page.get_by_text("retail/newer").wait_for()
        assert seen.page.locator("#adapters label input:checked").count() == 1, "what was chosen stays chosen"
        assert RETAIL in seen.ask(QUESTION)
        assert (seen.errors, seen.outside) == ([], [])


def test_a_phone_shows_one_column(app, browser, product, keep):
    with visit(browser, app.url, width=390, height=844) as seen:
        seen.upload(product)
        seen.ask(QUESTION)
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
        boxes = [seen.page.locator(place).bounding_box() for place in ("#image", "#ask", "#answers", "#registry")]
        assert [box["y"] for box in boxes] == sorted(box["y"] for box in boxes)
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
        assert seen.page.locator("#answers").evaluate("at => Math.abs(at.getBoundingClientRect().top) < 844")
        keep(seen, "phone")
        assert (seen.errors, seen.outside) == ([], [])


def test_the_keyboard_is_enough_and_things_have_names(app, browser, product):
    with visit(browser, app.url) as seen:
        seen.upload(product)
        seen.page.get_by_label("Question").focus()
        seen.page.keyboard.type(QUESTION)
        seen.page.keyboard.press("Enter")
        seen.page.locator("#answers .pg-time").first.wait_for()
        assert seen.page.locator("#answers").get_attribute("aria-live") == "polite"
        assert (
            seen.page.get_by_role("group", name="Adapters beside the base")
            .or_(seen.page.get_by_text("Adapters beside the base"))
            .count()
        )
        unnamed = seen.page.evaluate(
            """() => [...document.querySelectorAll("button, input, textarea, img")].filter(e => e.offsetParent &&
              !(e.ariaLabel || e.alt || e.innerText?.trim() || e.labels?.length || e.title)).map(e => e.outerHTML)"""
        )
        assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme, app, browser, product, keep):
    with visit(browser, app.url, scheme=scheme) as seen:
        seen.upload(product)
        seen.choose(RETAIL)
        seen.ask(QUESTION)
        keep(seen, f"desktop-{scheme}")
        for place in (
            ".pg-answer",
            ".pg-who small",
            ".pg-time",
            ".pg-chip.differs",
            ".pg-table small",
            ".pg-no",
            ".pg-foot",
        ):
            text, ground = (color(seen, place, kind) for kind in ("color", "background"))
            assert contrast(text, ground) >= 4.5, f"{place}: {text} on {ground}"


def color(seen, place, kind):
    """The text colour of an element, or that of what lies behind it, as RGB."""
    found = seen.page.locator(place).first.evaluate(
        """(at, kind) => {
          if (kind === "color") return getComputedStyle(at).color;
          for (; at; at = at.parentElement) {
            const behind = getComputedStyle(at).backgroundColor;
            if (!/, 0\\)|transparent/.test(behind)) return behind;
          }
          return "rgb(255, 255, 255)";
        }""",
        kind,
    )
    return [int(part) for part in re.findall(r"\d+", found)[:3]]


def contrast(first, second):
    """WCAG's contrast ratio."""
    linear = [
        np.where((c := np.array(rgb) / 255) <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        for rgb in (first, second)
    ]
    dark, light = sorted(float(part @ [0.2126, 0.7152, 0.0722]) for part in linear)
    return (light + 0.05) / (dark + 0.05)


def test_nothing_is_loaded_from_elsewhere_or_given_away(app, trained):
    with urllib.request.urlopen(app.url) as shown:
        policy, page = shown.headers["content-security-policy"], shown.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:\w+:)?//", page) == []
    with urllib.request.urlopen(f"{app.url}/theme.css") as theme:
        assert b"//fonts." not in theme.read()
    with urllib.request.urlopen(f"{app.url}/gradio_api/info") as info:
        assert b'"named_endpoints":{}' in info.read()
    for path in (f"gradio_api/file={trained[0] / 'foreign' / MANIFEST_NAME}", "gradio_api/file=/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{app.url}/{path}")


@pytest.mark.parametrize("place", ["http://images.invalid/1.png", "a file of this machine"])
def test_what_was_not_uploaded_is_neither_fetched_nor_read(app, product, place):
    """Whatever a browser sends; the server that fetched it would have asked for the name of the host."""
    path = place if place.startswith("http") else str(product)
    config = json.load(urllib.request.urlopen(f"{app.url}/config"))
    (image,) = [part["id"] for part in config["components"] if part["props"].get("elem_id") == "image"]
    called = next(event["id"] for event in config["dependencies"] if image in event["inputs"])
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event = {"data": [image, "Is it?", []], "fn_index": called, "session_hash": "crafted"}
    asked = urllib.request.Request(
        f"{app.url}/gradio_api/queue/join", json.dumps(event).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(asked).close()
    with urllib.request.urlopen(f"{app.url}/gradio_api/queue/data?session_hash=crafted", timeout=30) as stream:
        completed = next(line for line in stream if b"process_completed" in line)
    assert json.loads(completed.removeprefix(b"data: "))["success"] is False
    assert app.outside() == ""


def test_a_dual_encoder_chooses_among_labels(tiny_clip, browser, product, tmp_path):
    AdapterRegistry(tmp_path / "registry")
    words = ["--base", str(tiny_clip), "--registry", str(tmp_path / "registry")]
    with running_app(words, tmp_path / "app") as app:
        context = browser.new_context()
        page = context.new_page()
        page.goto(app.url)
        page.get_by_label("Labels to choose from").fill("a shirt, a hat")
        page.locator("#image input[type=file]").set_input_files(product)
        page.locator("#image img").wait_for()
        page.locator("#ask").click()
        page.locator("#answers .pg-time").wait_for()
        assert page.locator(".pg-answer").inner_text() in ("a shirt", "a hat")
        assert "There are no adapters in" in page.locator("#registry").inner_text()
        assert page.locator("#examples").count() == 0
        context.close()
        assert app.outside() == ""
        check_stop(app, signal.SIGTERM)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda signum: signum.name)
def test_a_signal_stops_it_while_a_page_is_open(signum, trained, browser, product, tmp_path):
    words = documented()[1]
    with running_app(words, tmp_path / "app", cwd=trained[0]) as app, visit(browser, app.url) as seen:
        seen.upload(product)
        assert seen.ask(QUESTION).keys() == {"base", MEDICAL, f"{RETAIL}@1"}
        check_stop(app, signum)


def check_stop(app, signum):
    began = time.monotonic()
    assert app.stop(signum) == 128 + signum
    assert time.monotonic() - began < 60  # a browser ends beside it
    log = app.log.read_text()
    assert "Traceback" not in log and "rror" not in log.partition("http://")[2], log
    assert list((app.log.parent / "tmp").iterdir()) == [], "images are left behind"

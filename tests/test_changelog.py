"""CHANGELOG.md: the form of Keep a Changelog, with the version of the project, and keys and files that stand."""

import re
import tomllib
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_its_sections_are_unreleased_and_then_the_releases_newest_first():
    first, *releases = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert first == "Unreleased"
    found = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - (\d{4}-\d\d-\d\d)", release).groups() for release in releases]
    numbers = [tuple(map(int, parts[:3])) for parts in found]
    assert numbers == sorted(numbers, reverse=True)
    assert all(date.fromisoformat(parts[3]) for parts in found)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ".".join(map(str, numbers[0])) == project["version"]
    releases_kept = {path.name for path in (ROOT / "tests" / "regression").glob("*.*.*")}
    assert {".".join(parts[:3]) for parts in found} == releases_kept


def test_its_entries_stand_under_the_kinds_in_order():
    for section in re.split(r"^## .*$", TEXT, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert kinds == [kind for kind in KINDS if kind in kinds] and kinds
        for part in re.split(r"^### .*$", section, flags=re.MULTILINE)[1:]:
            entries = re.split(r"^- ", part.strip(), flags=re.MULTILINE)[1:]
            assert entries and all(entry.strip().endswith(".") for entry in entries)


def test_its_links_lead_to_files_of_the_checkout():
    assert all((ROOT / path).is_file() for path in re.findall(r"\]\((?!https)([^)]+)\)", TEXT))

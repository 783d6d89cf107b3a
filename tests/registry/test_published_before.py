"""Publishing what was published before says so."""

import json

import pytest

from finetune.cli import main
from tests.registry.folders import edit

pytestmark = pytest.mark.usefixtures("no_sync")


def test_the_same_bytes_and_the_same_weights_are_named(registry, make_adapter):
    folder = make_adapter()
    assert registry.publish(folder).note is None
    assert registry.publish(folder).note == "version 2 has the same bytes as version 1"
    edit(folder, license="mit")
    assert registry.publish(folder).note == "version 3 has the same weights as version 2"
    assert registry.publish(make_adapter(seed=1)).note is None
    assert registry.publish(folder).note == "version 5 has the same bytes as version 3"
    other = make_adapter("medical/other")
    assert registry.publish(other).note is None, "another adapter's versions are not looked at"


def test_a_version_that_cannot_be_read_is_passed_over(registry, make_adapter):
    from pathlib import Path

    folder = make_adapter()
    first = registry.publish(folder)
    Path(registry.location, "blobs", "sha256", first.digest[:2], first.digest).unlink()
    edit(folder, license="mit")
    assert registry.publish(folder).note is None


def test_the_command_reports_it(registry, make_adapter, capsys):
    folder, place = str(make_adapter()), ["--registry", str(registry.location)]
    for expected in (None, "version 2 has the same bytes as version 1"):
        assert main(["registry", "publish", folder, *place]) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[1:] == ([expected] if expected else [])
    assert main(["registry", "publish", folder, "--json", *place]) == 0
    assert json.loads(capsys.readouterr().out)["note"] == "version 3 has the same bytes as version 2"

"""Names that lead elsewhere: as a reference, in a manifest, as an alias, and when they are published."""

import os.path

import pytest

from finetune.adapters.reference import AdapterRef
from finetune.errors import AdapterReferenceError, ManifestError
from finetune.registry import AdapterRegistry
from tests.safety.forging import Case, names, nothing

# What no namespace and no name may be.
NAMES = {
    "parent": "..",
    "up": "../x",
    "absolute": "/abs",
    "backslash": "..\\x",
    "device": "con",
    "device in capitals": "CON",
    "port": "lpt1",
    "dotted": "a.b",
    "a tensor's": "lora_A",
    "PEFT's own": "lora_",
    "right to left": "safe\u202egnp",
    "zero width": "a\u200bb",
    "300 characters": "x" * 300,
    "a megabyte": "x" * 2**20,
    "a case twin": "Cell",
    "a look-alike": "c\u0435ll",  # a Cyrillic e
    "empty": "",
    "space": "a b",
    "newline": "cell\n",
    "nothing but a zero": "\0",
    "terminal": "\x1b[2J",
    "a percent": "%2e%2e",
    "a drive": "c:x",
    "a flag": "-rf",
    "hidden": ".git",
}
SURROGATE = "a\ud800"  # not even UTF-8


@pytest.mark.parametrize("name", [*NAMES.values(), SURROGATE], ids=[*NAMES, "surrogate"])
def test_as_a_reference(stage, tmp_path, canary, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refs = (f"{name}/cell", f"testing/{name}", name, f"testing/cell@{name}/")
    with stage.unharmed(tmp_path, canary):
        for ref in (ref for ref in refs if not os.path.isdir(ref)):  # such as "..": a folder that its user names
            with pytest.raises(AdapterReferenceError, match="is not an adapter reference: ") as caught:
                stage.vlm.add(ref)
            text = str(caught.value)
            assert text.isprintable() and len(text) < 1000 and "ns/name@prod (an alias)" in text


def in_manifest(key, name):
    def forge(forgery):
        forgery.manifest[key] = name

    return forge


IN_MANIFEST = [
    Case(f"{kind} as {key}", in_manifest(key, name), ManifestError, f"is not a valid manifest of schema 3: {key}: ")
    for kind, name in NAMES.items()
    for key in ("name", "namespace")
]


@pytest.mark.parametrize("case", IN_MANIFEST[::2], ids=names)
def test_in_a_manifest(refused, case):
    refused(case)


@pytest.mark.parametrize("case", IN_MANIFEST[1::2], ids=names)
def test_published(refused, tmp_path, case):
    registry = AdapterRegistry(tmp_path / "registry")
    refused(case, registry.publish)
    assert not (tmp_path / "registry").exists(), "nothing was written"


@pytest.mark.parametrize(
    "name", sorted({*NAMES.values()} - {"con", "a.b", "lpt1", "lora_"}), ids=lambda name: repr(name)[:20]
)
def test_as_an_alias(refused, tmp_path, name):
    registry = AdapterRegistry(tmp_path / "registry")
    case = Case("alias", nothing, AdapterReferenceError, "an alias must be a letter a-z")
    refused(case, lambda folder: registry.publish(folder, aliases=[name]))
    assert not (tmp_path / "registry").exists(), "nothing was written"


def test_a_name_that_is_a_folder_too_stays_a_reference(stage, tmp_path, canary, monkeypatch):
    """A foreign folder in the working directory of an app does not replace a published adapter."""
    (tmp_path / "testing").mkdir()
    (tmp_path / "testing" / "cell").symlink_to(stage.good["lora"])
    monkeypatch.chdir(tmp_path)
    with stage.unharmed(tmp_path, canary), pytest.raises(LookupError, match="no adapter 'testing/cell'"):
        stage.vlm.add("testing/cell")


def test_every_reference_that_is_read_leads_to_one_place(stage):
    for text in ("testing/cell", "testing/cell@latest"):
        assert str(AdapterRef.parse(text)) == "testing/cell@latest"

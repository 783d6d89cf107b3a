"""What differs between two versions, told from their manifests."""

import json
from pathlib import Path

import pytest

from finetune.errors import IntegrityError
from finetune.registry.differences import Difference, differences
from tests.registry.folders import edit
from tests.scores import scores_json

pytestmark = pytest.mark.usefixtures("no_sync")
NAME = "medical/brain-mri"


@pytest.fixture
def publish(registry, make_adapter):
    """Return a function that publishes an adapter whose manifest differs from the first in ``fields``."""

    def publish(seed=0, **fields):
        folder = make_adapter(seed=seed, **fields.pop("files", {}))
        manifest = json.loads((folder / "manifest.json").read_text())
        edit(folder, **{field: _merged(manifest[field], value) for field, value in fields.items()})
        return registry.publish(folder)

    return publish


def _merged(old, new):
    if not isinstance(new, dict):
        return new
    old = old or {}
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _found(registry, a, b):
    return {d.path: (d.a, d.b) for d in differences(registry, a, b)}


def test_every_section_is_compared(registry, publish, make_adapter):
    one, two = "1" * 64, "2" * 64
    a = publish()
    adapter = {
        "peft_type": "LORA",
        "parts": [{"method": "lora", "options": {"r": 4}, "modules": {"vision": ["v"], "language": ["model.layer"]}}],
        "tensors": {"model.layer.lora_A": {"shape": [4, 4], "dtype": "F32"}},
    }
    b = publish(
        seed=1,
        training={"recipe_digest": one, "data": {"train": one, "test": two}, "rows": {"test": 3}, "steps": 9},
        adapter=adapter,
        task={"system_prompt": "Be brief."},
        metrics={"test": scores_json(0.8, question_types={"tumor": 0.9})},
        base={"hub_id": "toy/other", "files": {"model.safetensors": one}},
        processor={"tokenizer": two},
        toolchain={"torch": "3", "peft": "1"},
        license="mit",
        synthetic=False,
        probe={"seed": 1},
    )
    found = _found(registry, a, b)
    zero = "0" * 64
    weights = {path: found.pop(path) for path in list(found) if path.startswith("files.adapter_model")}
    probe, tensors = found.pop("probe"), found.pop("adapter.tensors.table")
    assert found == {
        "training.recipe_digest": (zero, one),
        "training.data.train": (zero, one),
        "training.data.test": (None, two),
        "training.rows.test": (None, 3),
        "training.seed": (0, 1),
        "training.steps": (3, 9),
        "adapter.lora.options.r": (2, 4),
        "adapter.lora.modules.vision": (None, ["v"]),
        "adapter.tensors.parameters": (8, 16),
        "task.system_prompt": (None, "Be brief."),
        "test.exact_match": (0.75, 0.8),
        "test.tumor.exact_match": (None, 0.9),
        "test.tumor.majority.exact_match": (None, 0.5),
        "test.tumor.blank_image.exact_match": (None, 0.25),
        "test.tumor.n": (None, 40),
        "test.tumor.truncated": (None, 0),
        "base.files.model.safetensors": (zero, one),
        "base.hub_id": ("toy/base", "toy/other"),
        "processor.tokenizer": (zero, two),
        "toolchain.torch": ("2", "3"),
        "toolchain.peft": (None, "1"),
        "license": (None, "mit"),
        "synthetic": (True, False),
    }
    assert list(weights) == ["files.adapter_model.safetensors.sha256"]
    assert all(len(before) == len(after) == 64 for before, after in (probe, tensors))
    sections = [path.split(".")[0] for path in _found(registry, a, b)]
    assert sorted(set(sections), key=sections.index)[:8] == [
        "training", "adapter", "task", "test", "base", "processor", "files", "toolchain",
    ]  # fmt: skip


def test_numbers_show_their_difference(registry, publish):
    a, b = publish(), publish(seed=1, metrics={"test": scores_json(0.5)}, synthetic=False)
    changes = {d.path: d.change for d in differences(registry, a, b)}
    assert changes["test.exact_match"] == -0.25 and changes["training.seed"] == 1
    assert changes["synthetic"] is None and changes["files.adapter_model.safetensors.sha256"] is None


def test_equal_versions_do_not_differ(registry, publish, make_adapter):
    a = publish()
    assert differences(registry, a, a) == []
    folder = make_adapter("medical/other")
    edit(folder, created="2032-01-01T00:00:00Z")
    other = registry.publish(folder)
    assert {d.path.split(".")[1] for d in differences(registry, a, other)} == {"adapter_model", "README"}
    both = differences(registry, a, other), differences(registry, other, a)
    assert [(d.a, d.b) for d in both[0]] == [(d.b, d.a) for d in both[1]]
    assert isinstance(both[0][0], Difference)


def test_what_is_compared_is_what_was_published(registry, publish):
    a = publish()
    blob = Path(registry.location, "blobs", "sha256", a.digest[:2], a.digest)
    blob.write_bytes(blob.read_bytes().replace(b"0.75", b"0.99"))
    with pytest.raises(IntegrityError, match=f"{a.digest}: its sha256 is"):
        differences(registry, a, a)

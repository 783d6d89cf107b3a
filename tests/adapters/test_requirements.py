"""Packages that an adapter needs: named when they are missing, and listed all the same."""

import pytest

from finetune import plugins
from finetune.adapters.manifest import AdapterManifest, canonical_json
from finetune.adapters.requirements import plugins_of, require_usable
from finetune.adapters.task_settings import ForeignTask
from finetune.errors import ManifestError, PluginError
from tests.adapters.test_manifest_schema_2 import read
from tests.test_plugins import Count

TASK = {"name": "count", "unit": "mm", "metrics": ["count_error"]}
NEEDED = {"group": "tasks", "name": "count", "package": "finetune-count", "version": "1.2"}


def manifest(*, task=TASK, plugins=(NEEDED,), **changes):
    fields = read().model_dump() | {"task": task, "plugins": list(plugins)} | changes
    return AdapterManifest.parse(canonical_json(fields))


def test_an_adapter_is_read_whatever_is_installed():
    found = manifest()
    assert isinstance(found.task, ForeignTask)
    assert AdapterManifest.parse(found.to_bytes()) == found
    assert found.task.model_dump() == TASK
    with pytest.raises(
        PluginError,
        match=r"needs the task 'count'. Its manifest names the package finetune-count \(trained with version",
    ):
        require_usable(found)


def test_an_error_names_a_part_that_a_script_registered():
    with pytest.raises(PluginError, match="which the training script registered"):
        require_usable(manifest(plugins=[NEEDED | {"package": None, "version": None}]))


def test_settings_that_another_version_does_not_take_are_reported(monkeypatch):
    monkeypatch.setattr(plugins, "_REGISTERED", {**plugins._REGISTERED, "tasks": {"count": Count}})
    found = manifest(task=TASK | {"gone": 1})
    assert isinstance(found.task, ForeignTask)
    with pytest.raises(
        PluginError, match="the installed version of finetune-count does not accept .* trained the adapter: 1.2"
    ):
        require_usable(found)


def test_what_a_manifest_does_not_use_is_not_asked_for():
    strange = {"group": "tasks", "name": "zzz", "package": "evil", "version": None}
    require_usable(manifest(task=read().task.model_dump(), plugins=[strange]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plugins": []}, "plugins must name the package of the task 'count'"),
        ({"plugins": [NEEDED | {"group": "files"}]}, "plugins.0.group: String should match"),
        ({"task": TASK | {"name": "../x"}}, "task.name: String should match"),
        ({"task": {"name": "vqa"}}, "task: .*must have the field answer_normalization"),
    ],
)
def test_a_manifest_that_names_none_is_refused(changes, message):
    with pytest.raises(ManifestError, match=message):
        manifest(**changes)


def test_only_names_from_outside_are_written_down(monkeypatch):
    monkeypatch.setattr(plugins, "_REGISTERED", {**plugins._REGISTERED, "tasks": {"count": Count}})
    (found,) = plugins_of([("tasks", "count"), ("tasks", "vqa"), ("methods", "lora"), ("families", "new_type")])
    assert (found.group, found.name, found.package) == ("tasks", "count", None)

"""Names from outside: registered in a script, or given by the entry points of a package."""

from importlib.metadata import EntryPoint

import pytest

from finetune import plugins
from finetune.errors import ModelError, PluginError, RecipeError
from finetune.metrics.building import metrics_of
from finetune.recipe import PromptSection, parse_recipe, task_of, tasks_for
from finetune.tables import TASKS
from finetune.tasks.vqa import VqaConfig, VqaTask

RAW = {
    "name": "a",
    "domain": "b",
    "model": {"name_or_path": "org/model"},
    "method": {"name": "lora"},
    "data": {"source": "jsonl", "root": "here"},
    "train": {"epochs": 1},
}


class CountConfig(PromptSection):
    name: str = "count"
    unit: str = "cells"


class Count(VqaTask):
    Config = CountConfig


class Distribution:
    def __init__(self, name):
        self.name, self.version = name, "1.2"


@pytest.fixture
def registered():
    plugins.register("tasks", "count", Count)
    yield
    plugins.unregister("tasks", "count")


@pytest.fixture
def installed(monkeypatch):
    """Return a function that makes entry points be there, as (package, name, value)."""

    def install(*points):
        def found(*, group):
            if group != "finetune.tasks":
                return []
            return [EntryPoint(name, value, group)._for(Distribution(package)) for package, name, value in points]

        monkeypatch.setattr(plugins, "entry_points", found)
        plugins._entry_points.cache_clear()

    yield install
    plugins._entry_points.cache_clear()


def test_a_registered_task_is_a_task_of_recipes(registered):
    recipe = parse_recipe({**RAW, "task": {"name": "count", "unit": "mm", "max_new_tokens": 3}}, source="here")
    assert isinstance(recipe.task, CountConfig)
    assert recipe.model_dump(mode="json")["task"]["unit"] == "mm"
    with pytest.raises(RecipeError, match="task.unti: unknown key. Did you mean 'unit'"):
        parse_recipe({**RAW, "task": {"name": "count", "unti": "mm"}}, source="here")
    assert plugins.find("tasks", "count", what="task") is Count


def test_what_is_taken_back_is_unknown_again(registered):
    plugins.unregister("tasks", "count")
    with pytest.raises(RecipeError, match=f"here: unknown task.name 'count'. Allowed: {', '.join(TASKS)}"):
        parse_recipe({**RAW, "task": {"name": "count"}}, source="here")


def test_the_same_again_changes_nothing_and_another_is_refused(registered):
    plugins.register("tasks", "count", Count)
    with pytest.raises(PluginError, match="the name must be new, but .*Count.* has it. Choose another"):
        plugins.register("tasks", "count", VqaTask)
    with pytest.raises(PluginError, match="the name must be new, but finetune itself has it"):
        plugins.register("tasks", "vqa", Count)
    with pytest.raises(PluginError, match="the name must be new, but finetune itself has it"):
        plugins.register("methods", "overrides", Count)  # saved adapters have the name
    with pytest.raises(PluginError, match="unknown group of plug-ins 'task'. Did you mean 'tasks'"):
        plugins.register("task", "count", Count)


def test_an_entry_point_is_looked_up_when_it_is_named(installed):
    installed(("finetune-count", "count", "tests.test_plugins:Count"))
    recipe = parse_recipe({**RAW, "task": {"name": "count"}}, source="here")
    assert recipe.task.unit == "cells"
    assert plugins.provider("tasks", "count") == plugins.Provider(package="finetune-count", version="1.2")
    assert plugins.provider("tasks", "vqa") is None
    assert plugins.names("tasks") == [*TASKS, "count"]
    with pytest.raises(PluginError, match="the name must be new, but the package finetune-count has it"):
        plugins.register("tasks", "count", Count)


def test_a_damaged_plug_in_is_named(installed):
    installed(("finetune-count", "count", "tests.no_such_module:Count"))
    with pytest.raises(
        PluginError, match="of the package finetune-count cannot be imported: ModuleNotFoundError: No module"
    ):
        parse_recipe({**RAW, "task": {"name": "count"}}, source="here")


def test_a_task_without_settings_is_refused(installed):
    installed(("finetune-count", "count", "tests.test_plugins:Distribution"))
    with pytest.raises(PluginError, match="must have an attribute Config"):
        parse_recipe({**RAW, "task": {"name": "count"}}, source="here")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([("mine", "vqa", "a:B")], "the package mine gives finetune.tasks the name 'vqa', which finetune itself has"),
        ([("one", "count", "a:B"), ("two", "count", "c:D")], "two packages give .* 'count': two and one"),
    ],
)
def test_a_name_given_twice_is_refused(installed, points, message):
    installed(*points)
    with pytest.raises(PluginError, match=message):
        plugins.names("tasks")


def test_a_class_of_the_same_name_takes_the_place_of_the_one_before(registered):
    again = type("Count", (VqaTask,), {"Config": CountConfig, "__module__": __name__, "__qualname__": "Count"})
    plugins.register("tasks", "count", again)
    assert plugins.find("tasks", "count", what="task") is again


def test_an_error_on_import_is_reported_of_that_plug_in_alone(installed, tmp_path, monkeypatch):
    (tmp_path / "finetune_broken.py").write_text("undefined\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(("finetune-broken", "broken", "finetune_broken:Task"))
    with pytest.raises(PluginError, match="'broken' of the package finetune-broken cannot be imported: NameError"):
        plugins.find("tasks", "broken", what="task")
    assert plugins.find("tasks", "vqa", what="task") is VqaTask
    assert "broken" in plugins.names("tasks")


class NeedyConfig(PromptSection):
    architectures = frozenset({"fusion"})

    name: str = "needy"
    classes: list[str]


def test_a_task_that_needs_a_setting_is_no_default(monkeypatch):
    needy = type("Needy", (VqaTask,), {"Config": NeedyConfig})
    monkeypatch.setattr(plugins, "_REGISTERED", {**plugins._REGISTERED, "tasks": {"needy": needy}})
    assert tasks_for("fusion") == ["needy"]
    with pytest.raises(
        ModelError, match="no default task for a base of the architecture .*: needy must have settings, got none"
    ):
        task_of("fusion")
    with pytest.raises(ModelError, match="no task supports a base of the architecture 'diffusion'"):
        tasks_for("diffusion")


def test_methods_that_were_not_looked_up_are_not_in_use(monkeypatch):
    monkeypatch.setattr(plugins, "_REGISTERED", {**plugins._REGISTERED, "methods": {"other": Count}})
    assert "other" in plugins.names("methods") and "other" not in plugins.in_use("methods")
    plugins.find("methods", "other", what="method")
    assert plugins.in_use("methods")[-1] == "other"
    plugins._FOUND.discard(("methods", "other"))


class Metric:
    key, unit, higher_is_better = "count_error", None, False

    def __init__(self, options):
        pass

    def row(self, prediction, example):
        return 0.0


def without(*names):
    return type("Metric", (), {name: value for name, value in vars(Metric).items() if name not in names})


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        ("count_error", without("unit"), "the metric count_error must have unit, but Metric has none"),
        ("count_error", without("row"), "the metric count_error must have row or corpus"),
        ("other", Metric, "the key of the metric other must be its name, .*; got 'count_error'"),
        (
            "n",
            type("N", (Metric,), {"key": "n"}),
            "must be its name, without a dot and not one of n, truncated",
        ),
        ("a.b", type("N", (Metric,), {"key": "a.b"}), "the key of the metric a.b must be its name, without a dot"),
    ],
)
def test_a_metric_that_could_not_be_named_is_refused(name, metric, message, monkeypatch):
    monkeypatch.setattr(plugins, "_REGISTERED", {**plugins._REGISTERED, "metrics": {name: metric}})
    task = VqaTask(VqaConfig(metrics=["exact_match", name]), None)
    with pytest.raises(PluginError, match=message):
        metrics_of(task)

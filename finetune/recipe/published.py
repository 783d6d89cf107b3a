"""A recipe as a manifest keeps it: all settings, without local paths and secrets."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from finetune.recipe.whole import Recipe

_PLACES = ("train.output_dir", "data.root")  # local paths: never published, for any value
_SECRET_KEY = re.compile(r"(^|_)(token|password|passphrase|secret|credentials?|api_?key)$", re.IGNORECASE)
_SECRET = re.compile(
    r"://[^/\s]*@"  # a URL with a user in it
    r"|://\S*[?#]"  # a URL with a signature after its path
    r"|\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|ASIA|eyJ)[A-Za-z0-9_.-]{8,}"
    r"|-----BEGIN "
)
_RANDOM = re.compile(r"(?=\S*[0-9])(?=\S*[a-z])(?=\S*[A-Z])[A-Za-z0-9_+/=-]{32,}")  # revisions have small letters only
_LOCAL = re.compile(r"^(/|~|\\|[A-Za-z]:[\\/]|\.{1,2}([\\/]|$)|file:)|(^|[\\/])\.\.([\\/]|$)")
_NOTHING = object()


def published_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data, without local paths, secrets and values from the environment.

    A value that is left out is left out with its key. The task's texts stay unchanged: the adapter's users need them.
    """
    raw = recipe.model_dump(mode="json")
    task = raw.pop("task")
    kept = _kept(raw, "", recipe.from_environment)
    if Path(recipe.model.name_or_path).exists():
        kept["model"].pop("name_or_path", None)
    if recipe.adapter.init_from and Path(recipe.adapter.init_from).exists():
        kept["adapter"].pop("init_from", None)
    return {key: task if key == "task" else kept[key] for key in Recipe.model_fields if key == "task" or key in kept}


def _kept(value: Any, key: str, hidden: Collection[str]) -> Any:
    if isinstance(value, Mapping):
        parts = {name: _kept(part, f"{key}.{name}".lstrip("."), hidden) for name, part in value.items()}
        return {name: part for name, part in parts.items() if part is not _NOTHING}
    if isinstance(value, list):
        return [part for part in (_kept(part, key, hidden) for part in value) if part is not _NOTHING]
    last = key.rpartition(".")[2]
    is_place = key in _PLACES or (key.startswith("data.sources.") and last == "root")
    if is_place or _SECRET_KEY.search(last) or (value is not None and str(value) in hidden):
        return _NOTHING
    if isinstance(value, str) and any(rule.search(value) for rule in (_SECRET, _RANDOM, _LOCAL)):
        return _NOTHING
    return value

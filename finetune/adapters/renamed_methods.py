"""The present names of methods, for files that an earlier revision wrote."""

from typing import Any

from finetune.tables import RENAMED_METHODS


def current_method(name: Any) -> Any:
    """Return the present name of a method from its name in a file, and anything else unchanged."""
    return RENAMED_METHODS.get(name, name) if isinstance(name, str) else name


def current_methods(text: str) -> str:
    """Return the present names of the methods in ``a+b``."""
    return "+".join(map(current_method, text.split("+")))


def current_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an ``adapter_config.json`` with the present names of the methods."""
    parts = config.get("parts")
    if not isinstance(parts, list):
        return config
    renamed = [
        part | {"method": current_method(part["method"])} if isinstance(part, dict) and "method" in part else part
        for part in parts
    ]
    return config | {"parts": renamed}

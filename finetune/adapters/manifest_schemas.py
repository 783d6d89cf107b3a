"""The schemas of a manifest: the conversion into the current one, and the error for a manifest that breaks it."""

from typing import Any

from pydantic import ValidationError

from finetune.adapters.manifest_schema_1 import from_schema_1
from finetune.adapters.manifest_schema_2 import from_schema_2
from finetune.core.old_names import MANIFEST, current_names
from finetune.errors import ManifestError, plain

CURRENT = 3
_MAX_DETAILED = 1000  # errors; a list of pydantic's errors takes a kilobyte for each


def schema_of(data: Any) -> int:
    """Return the schema of a manifest's parsed JSON; the current one for an unknown or missing number."""
    schema = data.get("schema_version", CURRENT) if isinstance(data, dict) else CURRENT
    return schema if type(schema) is int and schema in (1, 2) else CURRENT  # neither true nor 1.0


def current_fields(data: Any, schema: int, *, source: str) -> Any:
    """Return the fields of a manifest under the names of the current schema.

    Args:
        data: the parsed JSON.
        schema: its schema, from ``schema_of``.
        source: the path or name of the manifest, for errors.

    Raises:
        ManifestError: the manifest has a field of a later schema, or both names of a field that was renamed.
    """
    if schema == 1:
        data = from_schema_1(data, source=source)
    data = from_schema_2(data, source=source) if schema < CURRENT else data
    return current_names(data, MANIFEST, source=source, error=ManifestError)


def schema_error(error: ValidationError, schema: int, *, source: str) -> ManifestError:
    """Return the error for a manifest that breaks its schema, with the first three problems."""
    if (count := error.error_count()) > _MAX_DETAILED:
        return ManifestError(f"{source} is not a valid manifest of schema {schema}: {count} fields are wrong")
    first = error.errors(include_url=False, include_context=False, include_input=False)[:3]
    problems = "; ".join(
        f"{plain('.'.join(str(p) for p in e['loc'])) or 'top level'}: {plain(e['msg'])}" for e in first
    )
    return ManifestError(f"{source} is not a valid manifest of schema {schema}: {problems}")

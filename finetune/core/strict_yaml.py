"""YAML without its traps: a repeated key is an error, and 1e-3 is a number."""

import re
from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """The loader of YAML files that people write: ``yaml.load(text, StrictLoader)``."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node.

        Raises:
            yaml.YAMLError: a key is repeated, or is no plain value.
        """
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.YAMLError(f"line {line}: a key must be a word, got {key!r}")
            if key in seen:
                raise yaml.YAMLError(f"line {line}: a key must be unique, but {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)

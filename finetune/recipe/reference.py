"""The reference of a recipe's keys, ``docs/recipe.md``, written from the sections of this package.

Meanings are the texts under the fields, and examples are the fields' own, so that each stands in one place.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc, get_annotations
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

from finetune.plugins import own_configs
from finetune.recipe.chosen import Choice
from finetune.recipe.key_types import listed_values, type_text
from finetune.recipe.schema import recipe_schema
from finetune.recipe.section import Section, takes_variables
from finetune.recipe.whole import Recipe

_HEAD = """# Recipe reference

Made by `finetune schema --markdown docs/recipe.md` from the sections in `finetune/recipe/` and `finetune/tasks/`.

A recipe is a YAML file that describes a whole run. This one is complete:

```yaml
name: clothing
domain: retail
model: {name_or_path: pocket}
method: {name: lora, r: 8}
data: {source: jsonl, root: data/clothing}
train: {epochs: 3, learning_rate: 2e-4}
adapter: {publish: retail/clothing}
```

- A key that is not marked **required** may be left out; it then has the default of its row.
- An unknown key and a value of another type are refused before anything is loaded, with the file and the key.
- `finetune train recipe.yaml train.epochs=5 method.r=4` sets keys on the command line. Values are YAML.
- In a text of the type *path*, `${NAME}` stands for the environment variable `NAME`. A prompt keeps it unchanged, and
  any other text with it is refused.
- `NAME` in a key stands for a name of your own, or for a tower.
- An example shows the form of a value. It is no advice.
- Editors complete and check a recipe by its first line:
  `# yaml-language-server: $schema=PATH/docs/recipe.schema.json`.
- A plug-in adds methods, tasks, objectives and sources with keys of their own, which are not listed here
  ([extend.md](extend.md)).
"""


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a recipe.

    Attributes:
        path: the dotted key, such as ``train.epochs``.
        name: the last part of the key, the name of the field.
        section: the section that has the field.
    """

    path: str
    name: str
    section: type[Section]

    @property
    def field(self) -> FieldInfo:
        """The field of the section."""
        return self.section.model_fields[self.name]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of keys under a heading.

    Attributes:
        title: the text of the heading, as Markdown.
        level: the level of the heading, from 2.
        intro: the text before the table.
        sections: the sections that a link to this table may mean.
        keys: the keys, in order.
    """

    title: str
    level: int
    intro: str
    sections: tuple[type[Section], ...] = ()
    keys: tuple[Key, ...] = ()


def recipe_tables() -> list[Table]:
    """Return the tables of all keys, plug-ins' left out, in the order of a recipe."""
    tables = [Table(title="The whole recipe", level=2, intro="", sections=(Recipe,), keys=_keys("", Recipe))]
    seen: set[Any] = set()
    for key in tables[0].keys:
        tables += _inner_tables(key.path, key.field, level=2, seen=seen)
    return tables


def reference_text() -> str:
    """Return the text of ``docs/recipe.md``."""
    tables = recipe_tables()
    schema = recipe_schema()
    places = {section.__name__: f"#{anchor(table.title)}" for table in tables for section in table.sections}
    parts = [_HEAD]
    for table in tables:
        parts.append(f"{'#' * table.level} {table.title}\n")
        if table.intro:
            parts.append(f"{table.intro}\n")
        if table.keys:
            rows = ["| key | type | default | meaning | example |", "|---|---|---|---|---|"]
            rows += [_line(_row(key, schema, places)) for key in table.keys]
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _line(cells: list[str]) -> str:
    return "".join(["|", *(" " + cell.replace("|", "\\|") + " |" for cell in cells)])


def _row(key: Key, schema: dict[str, Any], places: dict[str, str]) -> list[str]:
    """Return the cells of a key: key, type, default, meaning, example."""
    root = schema if key.section is Recipe else schema["$defs"][key.section.__name__]
    own = root["properties"][key.name]
    kind = type_text(own, places)
    if takes_variables(key.field):
        kind = re.sub(r"\btext", "*path*", kind)
    default = "**required**" if key.field.is_required() else f"`{_yaml(_default(key.field))}`"
    meaning = " ".join((key.field.description or "").split()).replace("``", "`")
    return [f"`{key.path}`", kind, default, meaning, *(f"`{_yaml(value)}`" for value in _examples(key.field, own))]


def _examples(field: FieldInfo, schema: dict[str, Any]) -> list[Any]:
    """Return a list with one example: the field's own, else a value that its type lists; empty if there is none."""
    listed = listed_values(schema)
    others = [value for value in listed if value != field.default] if len(listed) > 1 else listed
    return (field.examples or others)[:1]


def _default(field: FieldInfo) -> Any:
    """Return the default of a field as plain data, without the defaults inside of a section."""
    default = field.get_default(call_default_factory=True, validated_data={})
    if not isinstance(default, Section):
        return default
    _, choice = _found(field.annotation, field)
    named = {choice.key: getattr(default, choice.key)} if isinstance(choice, Choice) else {}
    return named | default.model_dump(mode="json", exclude_defaults=True)


def _yaml(value: Any) -> str:
    """Return a value as one line of YAML."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _keys(path: str, section: type[Section]) -> tuple[Key, ...]:
    return tuple(Key(path=f"{path}.{name}".lstrip("."), name=name, section=section) for name in section.model_fields)


def _inner_tables(path: str, field: FieldInfo, *, level: int, seen: set[Any]) -> Iterator[Table]:
    """Yield the tables of the section, or of the choice of sections, that a field holds."""
    named, found = _found(field.annotation, field)
    mark = found.group if isinstance(found, Choice) else found
    if found is None or mark in seen:
        return
    seen.add(mark)
    path = f"{path}.NAME" if named else path
    if isinstance(found, Choice):
        yield from _tables_of_choice(path, found, seen=seen)
        return
    keys = _keys(path, found)
    yield Table(title=path, level=level, intro=_intro(found), sections=(found,), keys=keys)
    for key in keys:
        # The author of a recipe may name other keys of the same kind here.
        inner = f"{path}.NAME" if found.model_config.get("extra") == "allow" else key.path
        yield from _inner_tables(inner, key.field, level=3, seen=seen)


def _tables_of_choice(path: str, choice: Choice, *, seen: set[Any]) -> Iterator[Table]:
    """Yield the tables of the sections of a choice: first the keys that several share, then those of each one."""
    variants = {get_args(config.model_fields[choice.key].annotation)[0]: config for config in own_configs(choice.group)}
    variants = {name: config for name, config in variants.items() if name not in choice.without}
    noun = path if choice.key == "name" else choice.key
    groups = _shared(variants)
    titles = {
        names: f"{path}: keys of "
        + (f"every {noun}" if len(names) == len(variants) else ", ".join(f"`{name}`" for name in names))
        for names in groups
        if len(names) > 1
    }
    listed = ", ".join(f"[`{name}`](#{anchor(f'{path} {name}')})" for name in variants)
    intro = f"`{path}.{choice.key}` names the {noun}: {listed}."
    yield Table(title=path, level=2, intro=intro, sections=tuple(variants.values()))
    for names, title in titles.items():
        every = len(names) == len(variants)
        about = "" if every else " ".join(_intro(owner) for owner in dict.fromkeys(owner for owner, _ in groups[names]))
        keys = tuple(Key(path=f"{path}.{key}", name=key, section=variants[names[0]]) for _, key in groups[names])
        yield Table(title=title, level=3, intro=about, keys=keys)
    for name, config in variants.items():
        alone = {key for _, key in groups.get((name,), [])}
        own = tuple(key for key in _keys(path, config) if key.name in alone)
        shared = [f"[{title.partition(': ')[2]}](#{anchor(title)})" for names, title in titles.items() if name in names]
        also = f" It also has the {', the '.join(shared)}." if shared else ""
        yield Table(title=f"{path} `{name}`", level=3, intro=_intro(config) + also, keys=own)
        for key in own:
            yield from _inner_tables(key.path, key.field, level=3, seen=seen)


def _shared(variants: dict[str, type[Section]]) -> dict[tuple[str, ...], list[tuple[type[Section], str]]]:
    """Return the keys by the variants that have them from one class, with that class; those of most variants first."""
    having: dict[tuple[type[Section], str], list[str]] = defaultdict(list)
    for name, config in variants.items():
        for owner in reversed(config.__mro__):
            for key in get_annotations(owner):
                if key in config.model_fields and owner is _owner(config, key):
                    having[owner, key].append(name)
    groups: dict[tuple[str, ...], list[tuple[type[Section], str]]] = defaultdict(list)
    for place, names in having.items():
        groups[tuple(names)].append(place)
    return dict(sorted(groups.items(), key=lambda group: -len(group[0])))


def _owner(section: type[Section], key: str) -> type[Section]:
    """Return the class that has the last word on a key."""
    return next(owner for owner in section.__mro__ if key in get_annotations(owner))


def _intro(section: type[Section]) -> str:
    return " ".join(cleandoc(section.__doc__ or "").split()).replace("``", "`")


def _found(annotation: Any, field: FieldInfo | None = None) -> tuple[bool, type[Section] | Choice | None]:
    """Return what an annotation holds: whether under names of the author's own, and the section or choice."""
    for mark in field.metadata if field else ():
        if isinstance(mark, Choice):
            return False, mark
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return False, annotation
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        choice = next((mark for mark in arguments[1:] if isinstance(mark, Choice)), None)
        if choice is not None:
            return False, choice
        arguments = arguments[:1]
    for part in arguments:
        named, found = _found(part)
        if found is not None:
            return named or get_origin(annotation) is dict, found
    return False, None

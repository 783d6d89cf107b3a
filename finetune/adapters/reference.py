"""References: the strings by which people and programs name one version of an adapter.

Nothing here imports torch.
"""

import os.path
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from finetune.core.fields import DEVICES, NamePart, Sha256
from finetune.errors import AdapterReferenceError, brief

LATEST = "latest"
FORMS = "ns/name, ns/name@17 (a version), ns/name@prod (an alias) or ns/name@sha256:<64 hex digits>"

Alias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9._-]{0,63}$")]
VersionNumber = Annotated[int, Field(ge=1, lt=10**12)]

_NAME_RULE = "a name part is 1 to 64 of a-z, 0-9 and '-', and neither starts nor ends with '-'"
_ALIAS_RULE = "an alias is a letter a-z, then at most 63 of a-z, 0-9, '.', '_' and '-'"
_VERSION_TEXT = re.compile(r"[1-9][0-9]{0,11}")
_NAME_PART = TypeAdapter(NamePart)
_ALIAS = TypeAdapter(Alias)
_VERSION: TypeAdapter[int] = TypeAdapter(VersionNumber)
_SHA256 = TypeAdapter(Sha256)


def _fits(kind: TypeAdapter, value: object) -> bool:
    try:
        kind.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def check_name_part(part: str) -> str:
    """Return ``part`` when it may be a namespace or a name.

    Raises:
        AdapterReferenceError: it may not, with the rule.
    """
    if not _fits(_NAME_PART, part):
        if isinstance(part, str) and part in DEVICES:
            raise AdapterReferenceError(f"{part!r} is a device on Windows; choose another name.")
        raise AdapterReferenceError(f"{brief(part)} is no namespace and no name: {_NAME_RULE}.")
    return part


def check_alias(alias: str) -> str:
    """Return ``alias`` when versions may be called so.

    Raises:
        AdapterReferenceError: it may not, with the rule.
    """
    if not _fits(_ALIAS, alias):
        raise AdapterReferenceError(f"{brief(alias)} is no alias: {_ALIAS_RULE}.")
    return alias


@dataclass(frozen=True, kw_only=True)
class AdapterRef:
    """One adapter and exactly one way to choose its version; a value that exists is valid.

    Attributes:
        namespace: the namespace of a team or domain.
        name: the name of the adapter.
        version: the number of the version, from 1.
        alias: a movable name of a version; ``latest`` is the newest.
        digest: SHA-256 of the version's manifest.
    """

    namespace: str
    name: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        check_name_part(self.namespace)
        check_name_part(self.name)
        if sum(choice is not None for choice in (self.version, self.alias, self.digest)) != 1:
            raise AdapterReferenceError("give exactly one of version, alias and digest")
        if self.alias is not None:
            check_alias(self.alias)
        if self.version is not None and not _fits(_VERSION, self.version):
            raise AdapterReferenceError(f"{brief(self.version)} is no version: versions count from 1.")
        if self.digest is not None and not _fits(_SHA256, self.digest):
            raise AdapterReferenceError(f"{brief(self.digest)} is no digest: 64 of 0-9 and a-f.")

    @classmethod
    def parse(cls, text: str) -> "AdapterRef":
        """Read a reference; without a version it means the alias ``latest``.

        Raises:
            AdapterReferenceError: with what was got and the forms that are read.
        """
        if not isinstance(text, str):
            raise AdapterReferenceError(f"{brief(text)} is no adapter reference. Expected {FORMS}.")
        return _parsed(text)

    @classmethod
    def parse_name(cls, text: str) -> "AdapterRef":
        """Read ``ns/name``, for matters of all versions, as the reference of its latest.

        Raises:
            AdapterReferenceError: it is something else, or says a version.
        """
        if isinstance(text, str) and "@" in text:
            raise AdapterReferenceError(f"{brief(text)} says a version; here the form is ns/name.")
        return cls.parse(text)

    @property
    def full_name(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    def __str__(self) -> str:
        """Return the canonical form, which always says the version: ``ns/name@latest`` for ``ns/name``."""
        if self.digest is not None:
            return f"{self.full_name}@sha256:{self.digest}"
        return f"{self.full_name}@{self.alias if self.version is None else self.version}"


@lru_cache(maxsize=1024)  # an app is asked for the same few all the time
def _parsed(text: str) -> AdapterRef:
    path, at, choice = text.partition("@")
    namespace, slash, name = path.partition("/")
    try:
        if not slash:
            raise AdapterReferenceError("the '/' between namespace and name is missing.")
        if not at:
            return AdapterRef(namespace=namespace, name=name, alias=LATEST)
        if choice.startswith("sha256:"):
            return AdapterRef(namespace=namespace, name=name, digest=choice.removeprefix("sha256:"))
        if _VERSION_TEXT.fullmatch(choice):
            return AdapterRef(namespace=namespace, name=name, version=int(choice))
        return AdapterRef(namespace=namespace, name=name, alias=choice)
    except AdapterReferenceError as error:
        raise AdapterReferenceError(f"{brief(text)} is no adapter reference: {error} Expected {FORMS}.") from None


def folder_hint(name: str) -> str:
    """Return the spelling that means a folder: a text such as ``runs/mine`` reads as a reference."""
    for path in (Path(name), Path(name) / "adapter"):
        if (path / "manifest.json").is_file():
            return f" {name} reads as a reference; for the folder write ./{path.as_posix()}."
    return ""


def as_folder(ref: str | Path) -> Path | None:
    """Return the folder that ``ref`` means, or None where it is a registry reference.

    A text that reads as a reference is one, even where a folder of that name stands in the working directory.
    """
    if isinstance(ref, str):
        try:
            AdapterRef.parse(ref)
        except AdapterReferenceError:
            if not os.path.isdir(ref):  # Path.is_dir raises for a name that is too long
                raise
        else:
            return None
    elif not isinstance(ref, os.PathLike):
        raise AdapterReferenceError(f"{brief(ref)} is no adapter reference and no folder. Expected {FORMS}, or a path.")
    return Path(ref)

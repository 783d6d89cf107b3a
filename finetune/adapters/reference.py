"""References: the strings that name one version of an adapter.

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

_NAME_RULE = "a namespace or name must be 1 to 64 of a-z, 0-9 and '-', and must not start or end with '-'"
_ALIAS_RULE = "an alias must be a letter a-z, then at most 63 of a-z, 0-9, '.', '_' and '-'"
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
    """Return ``part`` if it is a valid namespace or name.

    Raises:
        AdapterReferenceError: ``part`` breaks the rule, which the message states.
    """
    if not _fits(_NAME_PART, part):
        if isinstance(part, str) and part in DEVICES:
            raise AdapterReferenceError(
                f"a namespace or name must not be a device name of Windows, got {part!r}. Choose another name."
            )
        raise AdapterReferenceError(f"{_NAME_RULE}; got {brief(part)}.")
    return part


def check_alias(alias: str) -> str:
    """Return ``alias`` if it is a valid alias.

    Raises:
        AdapterReferenceError: ``alias`` breaks the rule, which the message states.
    """
    if not _fits(_ALIAS, alias):
        raise AdapterReferenceError(f"{_ALIAS_RULE}; got {brief(alias)}.")
    return alias


@dataclass(frozen=True, kw_only=True)
class AdapterRef:
    """One adapter and exactly one way to choose its version. Every instance is valid.

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
        given = [name for name in ("version", "alias", "digest") if getattr(self, name) is not None]
        if len(given) != 1:
            raise AdapterReferenceError(
                f"an adapter reference must have exactly one of version, alias and digest, got "
                f"{', '.join(given) or 'none'}"
            )
        if self.alias is not None:
            check_alias(self.alias)
        if self.version is not None and not _fits(_VERSION, self.version):
            raise AdapterReferenceError(f"a version must be a whole number from 1, got {brief(self.version)}.")
        if self.digest is not None and not _fits(_SHA256, self.digest):
            raise AdapterReferenceError(f"a digest must be 64 of 0-9 and a-f, got {brief(self.digest)}.")

    @classmethod
    def parse(cls, text: str) -> "AdapterRef":
        """Read a reference; without a version it means the alias ``latest``.

        Raises:
            AdapterReferenceError: ``text`` has none of the forms, which the message lists.
        """
        if not isinstance(text, str):
            raise AdapterReferenceError(f"{brief(text)} is not an adapter reference. Expected {FORMS}.")
        return _parsed(text)

    @classmethod
    def parse_name(cls, text: str) -> "AdapterRef":
        """Read ``ns/name``, for commands on all versions of an adapter, as the reference of its latest version.

        Raises:
            AdapterReferenceError: ``text`` has another form, or names a version.
        """
        if isinstance(text, str) and "@" in text:
            raise AdapterReferenceError(f"{brief(text)} must have the form ns/name, without a version.")
        return cls.parse(text)

    @property
    def full_name(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    def __str__(self) -> str:
        """Return the canonical form, which always names the version: ``ns/name@latest`` for ``ns/name``."""
        if self.digest is not None:
            return f"{self.full_name}@sha256:{self.digest}"
        return f"{self.full_name}@{self.alias if self.version is None else self.version}"


@lru_cache(maxsize=1024)  # an app gets the same few references again and again
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
        raise AdapterReferenceError(f"{brief(text)} is not an adapter reference: {error} Expected {FORMS}.") from None


def folder_hint(name: str) -> str:
    """Return a hint on how to write a folder, since a text such as ``runs/mine`` reads as a reference."""
    for path in (Path(name), Path(name) / "adapter"):
        if (path / "manifest.json").is_file():
            return f" {name} reads as a reference; write ./{path.as_posix()} for the folder."
    return ""


def as_folder(ref: str | Path) -> Path | None:
    """Return the folder that ``ref`` names, or None for a registry reference.

    A text that reads as a reference is one, even if the working directory has a folder of that name.

    Raises:
        AdapterReferenceError: ``ref`` is neither a reference nor a folder.
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
        raise AdapterReferenceError(
            f"{brief(ref)} is neither an adapter reference nor a folder. Expected {FORMS}, or a path."
        )
    return Path(ref)

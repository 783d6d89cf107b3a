"""The trust policy: the keys that a reader accepts for each namespace; it is never part of a registry.

::

    keys:                               # the lines that `finetune registry keygen` printed
      - finetune-ed25519 3q2+7wAA...= alice
      - finetune-ed25519 mZk1ssAB...= release
    namespaces:
      medical: {signatures: require, keys: [release]}
      retail: {signatures: warn, keys: [alice, release]}
    default: {signatures: off}          # for every other namespace; also the default of this line
    revoked:
      alice: laptop stolen on 2031-03-01
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from finetune.adapters.manifest import NamePart
from finetune.core.file_owner import changeable_by_others
from finetune.core.file_state import file_key
from finetune.core.regular_file import open_regular
from finetune.core.system_errors import explain
from finetune.errors import TrustError
from finetune.lookup import did_you_mean
from finetune.registry.trust.signing import PublicKey, signing_key_id

TRUST_VARIABLE = "FINETUNE_TRUST"
NOT_SIGNED = "it is not signed"
UNSIGNED = "(nobody)"  # the signer of an unsigned entry; never the name of a key


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare off as False


Demand = Annotated[Literal["require", "warn", "off"], BeforeValidator(_off)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class NamespaceTrust(_Part):
    """The demand of a namespace for signatures."""

    signatures: Demand
    """``require`` refuses entries and manifests that no such key signed, ``warn`` only warns, ``off`` checks none."""
    keys: list[str] = []
    """Names of the keys that may sign there."""

    @model_validator(mode="after")
    def _require_keys(self) -> "NamespaceTrust":
        if self.signatures != "off" and not self.keys:
            raise ValueError(
                f"keys: must name at least one key with `signatures: {self.signatures}`, got none. Write keys: [NAME]."
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict of a policy on one signature.

    Attributes:
        signer: the signer, for people: the name of the key, ``UNSIGNED``, or a description of another key.
        problem: the reason why the namespace does not accept the signature; None when it does.
        forged: True if the signature names a key of the policy, but that key did not sign these bytes.
    """

    signer: str
    problem: str | None
    forged: bool = False


class TrustPolicy(_Part):
    """The keys and demands of a reader. Frozen and strict: an unknown key of the file is an error."""

    keys: list[str] = []
    """Public keys, each as the line that ``keygen`` printed."""
    namespaces: dict[NamePart, NamespaceTrust] = {}
    """The demand of each namespace."""
    default: NamespaceTrust = NamespaceTrust(signatures="off")
    """The demand of every other namespace."""
    revoked: dict[str, Annotated[str, Field(min_length=1)]] = {}
    """Names of keys that no namespace accepts any more, each with the reason."""

    @cached_property
    def _by_name(self) -> dict[str, PublicKey]:
        return {key.name: key for key in map(PublicKey.parse, self.keys)}

    @cached_property
    def _by_id(self) -> dict[str, PublicKey]:
        return {key.id: key for key in self._by_name.values()}

    @model_validator(mode="after")
    def _names_its_keys(self) -> "TrustPolicy":
        keys = [PublicKey.parse(key) for key in self.keys]
        for number, key in enumerate(keys):
            if key.name in (other.name for other in keys[:number]):
                raise ValueError(f"keys: a name must be unique, but {key.name!r} is given twice")
            if key.id in (other.id for other in keys[:number]):
                raise ValueError(f"keys: a key must be unique, but that of {key.name!r} is given twice")
        for where, part in (*((f"namespaces.{n}", p) for n, p in self.namespaces.items()), ("default", self.default)):
            self._check_names(f"{where}.keys", part.keys)
        self._check_names("revoked", self.revoked)
        return self

    def _check_names(self, where: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._by_name:
                known = ", ".join(self._by_name) or "none"
                hint = did_you_mean(name, self._by_name)
                raise ValueError(f"{where}: must name keys of the policy, got {name!r}.{hint} Keys: {known}")

    def of(self, namespace: str) -> NamespaceTrust:
        """Return the demand of a namespace."""
        return self.namespaces.get(namespace, self.default)

    def verify_signature(self, namespace: str, signature: str | None, message: bytes) -> Verdict:
        """Return the signer of a signature, and the reason if the namespace does not accept it.

        Args:
            namespace: the namespace of the adapter.
            signature: the signature in the log or beside the manifest; None where there is none.
            message: the message that it must sign.
        """
        if signature is None:
            return Verdict(signer=UNSIGNED, problem=NOT_SIGNED)
        key_id = signing_key_id(signature)
        key = self._by_id.get(key_id)
        if key is None:
            return Verdict(signer=f"unknown key {key_id[:16]}...", problem=self._signed_by(namespace, key_id))
        if not key.verifies(signature, message):
            problem = (
                f"its signature names the key of {key.name!r}, which did not sign these bytes: they were changed "
                "after the signing, or signed for another name"
            )
            return Verdict(signer=f"not {key.name}, whose key the signature names", problem=problem, forged=True)
        return Verdict(signer=key.name, problem=self._signed_by(namespace, key_id))

    def refusal(self, namespace: str, key_id: str) -> str | None:
        """Return a key in words and the reason why it may not sign in a namespace; None when it may."""
        key = self._by_id.get(key_id)
        if key is None:
            return f"the unknown key {key_id[:16]}..., which is not among the keys of the policy"
        if key.name in self.revoked:
            return f"the key of {key.name!r}, which is revoked: {self.revoked[key.name]}"
        if key.name not in (allowed := self.of(namespace).keys):
            shown = ", ".join(allowed) or "none"
            return (
                f"the key of {key.name!r}, which may not sign in the namespace {namespace!r} (keys that may: {shown})"
            )
        return None

    def _signed_by(self, namespace: str, key_id: str) -> str | None:
        refusal = self.refusal(namespace, key_id)
        return None if refusal is None else f"it is signed with {refusal}"


class PolicyFile:
    """A trust policy on the disk; a change to the file takes effect at once.

    Args:
        path: the path of the file.
        optional: True if the file may be missing; then no namespace requires signatures. A file that was read once
            must stay.
    """

    def __init__(self, path: Path, *, optional: bool = False) -> None:
        self.path = path.expanduser().absolute()
        self.optional = optional
        self._version: str | None = None
        self._policy = TrustPolicy()

    def read(self) -> TrustPolicy:
        """Return the policy.

        Raises:
            TrustError: the file is missing, is not a policy, or others on this machine can change it.
            StoreError: the file cannot be read.
        """
        try:
            version = file_key(self.path)
        except FileNotFoundError:
            # A broken link means that there should be a policy.
            if self.optional and self._version is None and not self.path.is_symlink():
                return self._policy
            version = None
        except OSError:
            version = None
        if version is None or version != self._version:
            self._policy = load_policy(self.path)  # raises when the file cannot be used
            self._version = version
        return self._policy


def default_policy_path() -> Path:
    """Return the path of the policy: ``$FINETUNE_TRUST``, or ``~/.finetune/trust.yaml`` by default."""
    return Path(os.environ.get(TRUST_VARIABLE) or Path.home() / ".finetune" / "trust.yaml").expanduser()


def load_policy(path: Path) -> TrustPolicy:
    """Read a trust policy.

    Raises:
        TrustError: the file is missing, is not a policy, or others on this machine can change it.
        StoreError: the file cannot be read.
    """
    import yaml

    from finetune.core.strict_yaml import StrictLoader

    try:
        if problem := changeable_by_others(path):
            raise TrustError(f"{path}: others on this machine can change this trust policy: {problem}")
        with open_regular(path) as file:
            raw = yaml.load(file.read(), StrictLoader)
    except FileNotFoundError:
        raise TrustError(f"{path}: there is no such trust policy ({TRUST_VARIABLE})") from None
    except OSError as error:
        raise explain(error, path, verb="read", elsewhere=f" ({TRUST_VARIABLE})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrustError(f"{path}: the trust policy must be valid YAML: {error}") from None
    if not isinstance(raw, dict):
        allowed = ", ".join(TrustPolicy.model_fields)
        raise TrustError(f"{path}: a trust policy must be a mapping with the keys {allowed}, got {type(raw).__name__}")
    try:
        return TrustPolicy.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(dict(e)) for e in error.errors()]
        raise TrustError(f"{path}: " + f"\n{path}: ".join(problems)) from None


def _explain(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "[key]")
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        inside = NamespaceTrust if len(error["loc"]) > 1 else TrustPolicy
        allowed = list(inside.model_fields)
        message = f"unknown key.{did_you_mean(error['loc'][-1], allowed)} Allowed here: {', '.join(allowed)}."
    elif error["type"] != "value_error":
        message += f". Got {error['input']!r}."
    return f"{where}: {message}" if where else message

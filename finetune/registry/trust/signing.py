"""Keys and signatures: Ed25519 over the manifest of an adapter and over every entry of a log.

A private key is a PEM file that only its owner can read; a public key is one line of text for a trust policy. A signed
message begins with its type, so a signature of an entry is never one of a manifest.
"""

import base64
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.core.file_owner import changeable_by_others
from finetune.core.system_errors import explain
from finetune.errors import TrustError
from finetune.registry.trust.key_files import (
    create_file,
    make_folder,
    public_path,
    read_passphrase,
    read_private,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# Imported in functions: it takes longer than all other imports here, and most commands sign and check nothing.

PUBLIC_FORM = "finetune-ed25519 <base64 of the public key> <name>"
MAX_SIGNATURE_BYTES = 1024

_SIGNATURE = re.compile(r"ed25519:([0-9a-f]{64}):([A-Za-z0-9+/]{86}==)")
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
_PUBLIC = re.compile(rf"finetune-ed25519 ([A-Za-z0-9+/]{{43}}=) ({_KEY_NAME.pattern})")


def _decode(text: str) -> bytes:
    # The last character of base64 has unused bits; only one text may stand for the same bytes.
    raw = base64.b64decode(text, validate=True)
    if base64.b64encode(raw).decode() != text:
        raise ValueError("must be the canonical base64 of its bytes, got other unused bits")
    return raw


def check_signature(text: str) -> str:
    """Return ``text`` when it has the form of a signature, without checking who made it.

    Raises:
        ValueError: the text does not have that form.
    """
    match = _SIGNATURE.fullmatch(text)
    if match is None:
        raise ValueError("a signature must have the form ed25519:<sha256 of the public key>:<base64 of 64 bytes>")
    _decode(match[2])
    return text


Signature = Annotated[str, AfterValidator(check_signature)]


def signing_key_id(signature: str) -> str:
    """Return the id of the key that a signature names."""
    return signature.split(":")[1]


def entry_message(namespace: str, name: str, fields: dict[str, Any]) -> bytes:
    """Return the message that is signed for an entry of a log.

    The name is part of it, so an entry is valid for one adapter only. The registry is not part of it, so entries may be
    copied to another registry unchanged.

    Args:
        namespace: the namespace of the adapter.
        name: the name of the adapter.
        fields: all fields of the entry but its signature.
    """
    message = {"namespace": namespace, "name": name, "entry": fields}
    return b"finetune: entry of a log, version 1\n" + canonical_json(message)


def manifest_message(digest: str) -> bytes:
    """Return the message that is signed for a manifest, given its SHA-256; it covers the adapter's name and files."""
    return b"finetune: manifest of an adapter, version 1\n" + digest.encode()


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """A public key, which checks signatures.

    Attributes:
        raw: the 32 bytes of the key.
        name: the name of its owner, for people; a policy refers to it.
    """

    raw: bytes
    name: str

    @classmethod
    def parse(cls, line: str) -> "PublicKey":
        """Read the line that ``keygen`` printed.

        Raises:
            TrustError: the line does not have that form.
        """
        try:
            match = _PUBLIC.fullmatch(line)
            if match is None:
                raise ValueError("it does not have that form")
            return cls(raw=_decode(match[1]), name=match[2])
        except ValueError as error:
            shown = line if len(line) <= 120 else f"{line[:117]}..."
            raise TrustError(f"a public key must be {PUBLIC_FORM}, got {shown!r}: {error}.") from None

    @property
    def line(self) -> str:
        """The key as one line of text."""
        return f"finetune-ed25519 {base64.b64encode(self.raw).decode()} {self.name}"

    @cached_property
    def id(self) -> str:
        """SHA-256 of the 32 bytes; signatures name the key by it."""
        return sha256_hex(self.raw)

    @cached_property
    def _key(self) -> "Ed25519PublicKey":
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        return Ed25519PublicKey.from_public_bytes(self.raw)

    def verifies(self, signature: str, message: bytes) -> bool:
        """Return whether this key made ``signature`` over ``message``."""
        from cryptography.exceptions import InvalidSignature

        match = _SIGNATURE.fullmatch(signature)
        if match is None or match[1] != self.id:
            return False
        try:
            self._key.verify(_decode(match[2]), message)
        except (InvalidSignature, ValueError):
            return False
        return True


class SigningKey:
    """A private key, held in memory."""

    def __init__(self, key: "Ed25519PrivateKey") -> None:
        self._key = key
        self.id = sha256_hex(key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> "SigningKey":
        """Return a new key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | Path) -> "SigningKey":
        """Read a key from the file that ``keygen`` wrote.

        The passphrase of an encrypted key comes from ``$FINETUNE_SIGNING_PASSPHRASE``, or else from the terminal.

        Raises:
            TrustError: others can read or change the file, it holds no such key, or the passphrase is missing or wrong.
            StoreError: the file cannot be read.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        path = Path(path).expanduser()
        pem = read_private(path)
        password = None
        if pem.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----"):
            password = read_passphrase(path)
        elif not pem.startswith(b"-----BEGIN PRIVATE KEY-----"):
            raise TrustError(
                f"{path}: must be a private key as PEM (PKCS#8). Make one with `finetune registry keygen`."
            )
        try:
            key = load_pem_private_key(pem, password)
        except (ValueError, TypeError) as error:
            why = "the passphrase is wrong, or the file is damaged" if password else f"the file is damaged: {error}"
            raise TrustError(f"{path}: {why}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise TrustError(
                f"{path}: must be an Ed25519 key, got another type. Make one with `finetune registry keygen`."
            )
        return cls(key)

    def save(self, path: Path, name: str, *, passphrase: str | None = None) -> PublicKey:
        """Write the private key to ``path``, readable by its owner only, and the public one beside it as ``.pub``.

        Args:
            path: the path of the private key.
            name: the name of its owner.
            passphrase: the passphrase that encrypts the private key; None for no encryption.

        Raises:
            TrustError: one of the two files exists, the name is not allowed, or others can change the folder.
            StoreError: the files cannot be written.
        """
        from cryptography.hazmat.primitives import serialization as how

        public = self.public(name)
        lock = how.BestAvailableEncryption(passphrase.encode()) if passphrase else how.NoEncryption()
        pem = self._key.private_bytes(how.Encoding.PEM, how.PrivateFormat.PKCS8, lock)
        path = path.expanduser()
        try:
            make_folder(path.parent, mode=0o700)
            if problem := changeable_by_others(path.parent):
                raise TrustError(
                    f"{path}: others on this machine could replace a key there, so none was made: {problem} (or choose "
                    "another folder with --out)"
                )
            create_file(path, pem, mode=0o600)
            try:
                create_file(public_path(path), f"{public.line}\n".encode(), mode=0o644)
            except BaseException:
                path.unlink()
                raise
        except OSError as error:
            raise explain(error, path, verb="write", elsewhere=" (--out)") from error
        return public

    def public(self, name: str) -> PublicKey:
        """Return the public key.

        Args:
            name: the name of its owner.

        Raises:
            TrustError: the name is not allowed.
        """
        if not _KEY_NAME.fullmatch(name):
            raise TrustError(
                "the name of a key must be a letter or digit, then at most 127 of those, '.', '_', '@' and '-'; got "
                f"{name[:130]!r}. Choose another one (--name)."
            )
        return PublicKey(raw=self._key.public_key().public_bytes_raw(), name=name)

    def sign(self, message: bytes) -> Signature:
        """Return the signature over ``message``."""
        return f"ed25519:{self.id}:{base64.b64encode(self._key.sign(message)).decode()}"

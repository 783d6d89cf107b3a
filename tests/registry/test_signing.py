"""Keys, and the files they lie in; what is signed, and in which one form."""

import base64
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from finetune.adapters.manifest import sha256_hex
from finetune.errors import StoreError, TrustError
from finetune.registry.trust import key_files
from finetune.registry.trust.signing import (
    PublicKey,
    SigningKey,
    check_signature,
    entry_message,
    manifest_message,
    public_path,
)

# RFC 8032, section 7.1, test 2: secret key, public key, message, signature.
SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
SIGNED = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_a_signature_is_that_of_rfc_8032():
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(SECRET))
    public = key.public("someone")
    signature = key.sign(b"\x72")
    assert signature == f"ed25519:{sha256_hex(PUBLIC)}:{base64.b64encode(SIGNED).decode()}"
    assert public.line == f"finetune-ed25519 {base64.b64encode(PUBLIC).decode()} someone"
    assert PublicKey.parse(public.line) == public and public.id == key.id == sha256_hex(PUBLIC)
    assert public.verifies(signature, b"\x72")
    assert not public.verifies(signature, b"\x73")
    assert not SigningKey.generate().public("someone").verifies(signature, b"\x72")
    assert not public.verifies("nonsense", b"\x72")
    assert not public.verifies(signature.replace(public.id, "0" * 64), b"\x72"), "it names another key"


def test_a_second_signature_cannot_be_made_of_one():
    """s + L signs the same message in naive implementations, and would be another entry of the same meaning."""
    order = 2**252 + 27742317777372353535851937790883648493
    s = (int.from_bytes(SIGNED[32:], "little") + order).to_bytes(32, "little")
    public = PublicKey(raw=PUBLIC, name="someone")
    other = f"ed25519:{public.id}:{base64.b64encode(SIGNED[:32] + s).decode()}"
    assert check_signature(other) == other
    assert not public.verifies(other, b"\x72")


def test_a_signed_message_names_its_type():
    digest = "0" * 64
    entry = entry_message("medical", "brain", {"seq": 1, "manifest": digest})
    assert entry == (
        b"finetune: entry of a log, version 1\n"
        b'{"entry":{"manifest":"' + digest.encode() + b'","seq":1},"name":"brain","namespace":"medical"}'
    )
    assert manifest_message(digest) == b"finetune: manifest of an adapter, version 1\n" + digest.encode()


GOOD = SigningKey(Ed25519PrivateKey.from_private_bytes(SECRET)).public("someone").line


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (GOOD.replace("finetune-ed25519", "ssh-ed25519"), "does not have that form"),
        (GOOD.rsplit(" ", 1)[0], "does not have that form"),
        (f"{GOOD} twice", "does not have that form"),
        (f"{GOOD}\n", "does not have that form"),
        (GOOD.replace(" someone", "  someone"), "does not have that form"),
        (GOOD.replace("someone", "../x"), "does not have that form"),
        (GOOD.replace("someone", "x" * 200), "does not have that form"),
        (GOOD.replace("=", ""), "does not have that form"),
        (GOOD.replace("w= ", "x= "), "must be the canonical base64"),  # two bits of the last character mean nothing
    ],
)
def test_lines_that_are_no_public_keys(line, why):
    assert line != GOOD
    with pytest.raises(
        TrustError, match=f"a public key must be finetune-ed25519 <base64 of the public key> <name>, got .*{why}"
    ):
        PublicKey.parse(line)


# Files.


def test_a_key_is_written_for_its_owner_only_and_read_again(tmp_path):
    path = tmp_path / "keys" / "release.pem"
    key = SigningKey.generate()
    umask = os.umask(0)
    try:
        public = key.save(path, "release")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text().startswith("-----BEGIN PRIVATE KEY-----\n")
    assert public_path(path).read_text() == f"{public.line}\n"
    assert public.verifies(SigningKey.load(path).sign(b"x"), b"x")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o620])
def test_a_key_that_others_can_reach_is_refused(tmp_path, mode):
    path = tmp_path / "key.pem"
    SigningKey.generate().save(path, "me")
    path.chmod(mode)
    with pytest.raises(
        TrustError, match=rf"key.pem: others .* private key \(mode {mode:04o}\). If no other user did, run `chmod 600"
    ):
        SigningKey.load(path)
    path.chmod(0o400)
    SigningKey.load(path)


@pytest.mark.parametrize("taken", ["me.pem", "me.pem.pub"])
def test_no_key_is_overwritten(tmp_path, taken):
    (tmp_path / taken).write_text("mine")
    with pytest.raises(TrustError, match=f"{taken} exists, and a key is never overwritten. Choose another file .--out"):
        SigningKey.generate().save(tmp_path / "me.pem", "me")
    assert os.listdir(tmp_path) == [taken] and (tmp_path / taken).read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*me.pem: .*\(--out\)"):
        SigningKey.generate().save(tmp_path / "file" / "me.pem", "me")
    for name in ("me and you", "../me", "-me", "x" * 200, ""):
        with pytest.raises(
            TrustError, match="the name of a key must be a letter or digit, then .* got .*Choose another one .--name"
        ):
            SigningKey.generate().save(tmp_path / "me.pem", name)
    assert os.listdir(tmp_path) == ["file"]


def _pem(key, kind=serialization.PrivateFormat.PKCS8) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a private key as PEM"),
        (b"hello", "must be a private key as PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "the file is damaged: "),
        (
            lambda: _pem(rsa.generate_private_key(65537, 2048)),
            "must be an Ed25519 key, got another type. Make one with .*keygen",
        ),
        (
            lambda: _pem(Ed25519PrivateKey.generate(), serialization.PrivateFormat.OpenSSH),
            "must be a private key as PEM",
        ),
        (b"-----BEGIN PRIVATE KEY-----\n" * 5000, "a signing key must have at most 65536 bytes, got more"),
    ],
)
def test_files_that_hold_no_key(tmp_path, content, message):
    path = tmp_path / "key.pem"
    path.write_bytes(content() if callable(content) else content)
    path.chmod(0o600)
    with pytest.raises(TrustError, match=f"key.pem: {message}"):
        SigningKey.load(path)
    with pytest.raises(
        TrustError,
        match="none.pem: there is no such signing key .--sign-with or FINETUNE_SIGNING_KEY.. Make one with .*keygen",
    ):
        SigningKey.load(tmp_path / "none.pem")
    with pytest.raises(StoreError, match="cannot read .*: Is a directory"):
        SigningKey.load(tmp_path)


def test_an_encrypted_key_asks_for_its_passphrase(tmp_path, monkeypatch):
    path = tmp_path / "key.pem"
    key = SigningKey.generate()
    key.save(path, "me", passphrase="sesame")
    assert path.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(
        TrustError, match="the key is encrypted. Give its passphrase in FINETUNE_SIGNING_PASSPHRASE, or use a"
    ):
        SigningKey.load(path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(key_files.getpass, "getpass", lambda prompt: "sesame")
    assert SigningKey.load(path).id == key.id
    monkeypatch.setenv("FINETUNE_SIGNING_PASSPHRASE", "open")
    with pytest.raises(TrustError, match="the passphrase is wrong, or the file is damaged"):
        SigningKey.load(path)
    monkeypatch.setenv("FINETUNE_SIGNING_PASSPHRASE", "sesame")
    assert SigningKey.load(path).id == key.id
    plain = tmp_path / "plain.pem"
    key.save(plain, "me")
    assert SigningKey.load(plain).id == key.id, "a passphrase that is not needed is no error"


def test_without_signatures_no_cryptography_is_loaded():
    code = (
        "import sys, finetune.registry, finetune.registry.cli; from finetune.registry import AdapterRegistry;"
        "AdapterRegistry('nowhere').list(); print('cryptography' in sys.modules, 'yaml' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["False", "False"]

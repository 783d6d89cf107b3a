"""``finetune registry``: keygen, verify-folder, forget, and what signing changes in the other verbs."""

import json
from pathlib import Path

import pytest

from finetune import cli
from finetune.registry import AdapterRegistry
from finetune.registry.cli import signing as verbs
from finetune.registry.trust.signing import PublicKey, SigningKey
from tests.registry.signed import NAME, change, entry_path, read_entry

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def finetune(registry, capsys, monkeypatch):
    """Return a function that runs ``finetune registry ...`` and return exit code, output and errors."""
    monkeypatch.setenv("FINETUNE_REGISTRY", registry.location)

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main(["registry", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def release(finetune, tmp_path) -> Path:
    """The key of who releases; the policy of the user requires it for medical."""
    code, out, err = finetune("keygen", "--name", "release", "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    path = Path(made["private"])
    assert path == tmp_path / "home" / ".finetune" / "keys" / "release.pem"
    assert Path(made["public"]).read_text() == made["line"] + "\n"
    assert PublicKey.parse(made["line"]).id == made["id"] == SigningKey.load(path).id
    ask(tmp_path, "require", made["line"])
    return path


def ask(tmp_path, signatures, line):
    (tmp_path / "home" / ".finetune" / "trust.yaml").write_text(
        f"keys: [{line}]\nnamespaces:\n  medical: {{signatures: {signatures}, keys: [release]}}\n"
    )


def test_the_walk(finetune, release, make_adapter, tmp_path, monkeypatch):
    folder = make_adapter(seed=1)
    code, out, err = finetune("publish", folder)
    assert (
        code == 2
        and "there is no key to sign with. Give the file of a key with --sign-with or FINETUNE_SIGNING_KEY" in err
    )
    assert finetune("publish", folder, "--sign-with", release)[0] == 0
    monkeypatch.setenv("FINETUNE_SIGNING_KEY", str(release))
    assert finetune("publish", make_adapter(seed=2), "--alias", "prod")[0] == 0
    assert finetune("alias", NAME, "prod", 1)[0] == 0
    assert finetune("rollback", NAME, "prod")[0] == 0
    assert finetune("yank", f"{NAME}@1")[0] == 0
    assert finetune("yank", f"{NAME}@1", "--undo")[0] == 0
    header, *rows = finetune("log", NAME)[1].splitlines()
    assert header.endswith("  SIGNED BY")
    assert len(rows) == 6 and all(row.endswith("  release") for row in rows)
    entries = json.loads(finetune("log", NAME, "--json")[1])
    assert [entry["signed_by"] for entry in entries] == ["release"] * 6
    assert json.loads(finetune("resolve", NAME, "--json")[1])["signature"] == entries[1]["manifest_signature"]
    code, out, err = finetune("verify")
    assert (code, err) == (0, "") and out.startswith("entries signed: 6 by release\n")
    assert json.loads(finetune("verify", "--json")[1])["signed_by"] == {"release": 6}
    assert finetune("pull", f"{NAME}@prod", "--into", tmp_path / "out")[0] == 0
    code, out, err = finetune("verify-folder", tmp_path / "out")
    assert (code, out) == (
        0,
        f"{NAME}: every byte matches its manifest; signed by release (the policy: require)\n",
    )


def test_a_refusal_is_one_line(finetune, release, make_adapter):
    finetune("publish", make_adapter(), "--sign-with", release)
    change(AdapterRegistry().location, 1, signature=None)
    code, out, err = finetune("resolve", NAME)
    assert (code, out) == (2, "")
    assert err.startswith(
        f"error: {NAME}: entry 1 of its log (publish): it is not signed. In the namespace 'medical' the"
    )
    assert err.count("\n") == 1
    assert finetune("log", NAME)[1].splitlines()[1].endswith("  (nobody)")
    code, out, err = finetune("verify")
    first, second, summary = out.splitlines()
    assert code == 1 and first.endswith("000000000001.json: it is not signed")
    assert "was seen here before, so this is another log" in second and summary.endswith(", 2 problems")


def test_a_warning_is_one_line(finetune, release, make_adapter, tmp_path):
    finetune("publish", make_adapter(), "--sign-with", release)
    change(AdapterRegistry().location, 1, signature=None)
    ask(tmp_path, "warn", release.with_name("release.pem.pub").read_text().strip())
    for words in (("resolve", NAME), ("pull", NAME), ("alias", NAME, "prod", 1)):
        code, out, err = finetune(*words)
        assert code == 0 and out
        assert err.startswith(f"warning: {NAME}: entry 1 of its log (publish): it is not signed. ")
        assert err.count("\n") == 1
    ask(tmp_path, "off", release.with_name("release.pem.pub").read_text().strip())
    assert finetune("resolve", NAME)[2] == ""


def test_a_folder_without_a_signature(finetune, release, make_adapter, tmp_path):
    folder = make_adapter()
    code, out, err = finetune("verify-folder", folder)
    assert (code, out) == (1, f"{NAME}: every byte matches its manifest; it is not signed (the policy: require)\n")
    shown = json.loads(finetune("verify-folder", folder, "--json")[1])
    assert shown == {
        "name": NAME,
        "signed_by": "(nobody)",
        "signatures": "require",
        "accepted": False,
        "problem": "it is not signed",
    }
    shoes = make_adapter("retail/shoes")
    code, out, err = finetune("verify-folder", shoes)
    assert (code, out) == (0, "retail/shoes: every byte matches its manifest; it is not signed (the policy: off)\n")
    (shoes / "manifest.sig").write_text(SigningKey.load(release).sign(b"something else"))
    code, out, err = finetune("verify-folder", shoes)
    assert code == 1 and "its signature names the key of 'release', which did not sign these bytes" in out


def test_forget(finetune, release, make_adapter):
    finetune("publish", make_adapter(seed=1), "--sign-with", release)
    finetune("alias", NAME, "prod", 1, "--sign-with", release)
    location = AdapterRegistry().location
    digest = read_entry(location, 2).digest
    entry_path(location, 2).unlink()
    code, out, err = finetune("resolve", NAME)
    assert code == 2 and f"its newest entry is 1, but entry 2 (sha256:{digest}) was seen here before" in err
    assert finetune("forget", NAME)[1] == f"forgotten: {NAME} in {location}\n"
    assert finetune("resolve", NAME)[0] == 0
    assert json.loads(finetune("forget", NAME, "--json")[1]) == {"name": NAME, "forgotten": True}
    assert finetune("forget", NAME)[1] == f"nothing was seen: {NAME} in {location}\n"
    assert "must have the form ns/name, without a version" in finetune("forget", f"{NAME}@1")[2]


def test_keygen(finetune, tmp_path, monkeypatch):
    monkeypatch.setattr(verbs, "current_actor", lambda: "eve o'hara@host")
    code, out, err = finetune("keygen")
    path = tmp_path / "home" / ".finetune" / "keys" / "eve-o-hara@host.pem"
    assert (code, err) == (0, "")
    first, second, line = out.splitlines()
    assert first == f"private key: {path} (keep it secret; sign with it: export FINETUNE_SIGNING_KEY={path})"
    assert second.startswith(f"public key:  {path}.pub (") and line == Path(f"{path}.pub").read_text().strip()
    code, out, err = finetune("keygen")
    assert code == 2 and "exists, and a key is never overwritten" in err
    err = finetune("keygen", "--name", "a b", "--out", tmp_path / "k")[2]
    assert "the name of a key must be a letter or digit" in err and "got 'a b'." in err
    assert not (tmp_path / "k").exists()


def test_an_encrypted_key(finetune, tmp_path, monkeypatch):
    monkeypatch.setattr(verbs.sys.stdin, "isatty", lambda: False, raising=False)
    out = tmp_path / "k.pem"
    encrypted = ("keygen", "--out", out, "--encrypt", "--name", "me")
    assert "no terminal to type a passphrase. Give it in FINETUNE_SIGNING_PASSPHRASE" in finetune(*encrypted)[2]
    monkeypatch.setattr(verbs.sys.stdin, "isatty", lambda: True, raising=False)
    typed = iter(["one", "two", "", ""])
    monkeypatch.setattr(verbs.getpass, "getpass", lambda prompt: next(typed))
    assert "the two passphrases must be the same, and differ. No key was made" in finetune(*encrypted)[2]
    assert "the passphrase must not be empty. No key was made" in finetune(*encrypted)[2]
    assert not out.exists()
    monkeypatch.setenv("FINETUNE_SIGNING_PASSPHRASE", "sesame")
    assert finetune(*encrypted)[0] == 0
    assert out.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    SigningKey.load(out)


def test_a_key_can_be_made_with_a_broken_policy(finetune, tmp_path, make_adapter):
    (tmp_path / "home" / ".finetune").mkdir(parents=True)
    (tmp_path / "home" / ".finetune" / "trust.yaml").write_text("default: maybe")
    assert finetune("keygen", "--name", "me")[0] == 0
    code, out, err = finetune("publish", make_adapter())
    assert code == 2 and "trust.yaml: default: " in err


def test_a_history_without_signatures_continues_by_the_way_out_of_its_error(finetune, release, make_adapter, tmp_path):
    public = release.with_name("release.pem.pub").read_text().strip()
    ask(tmp_path, "off", public)
    finetune("publish", make_adapter(), "--alias", "prod")
    ask(tmp_path, "require", public)
    code, _, err = finetune("resolve", f"{NAME}@prod")
    assert code == 2 and "it is not signed" in err
    for words in (
        "`signatures: warn` in a copy of the policy (FINETUNE_TRUST=COPY)",
        "(FINETUNE_SIGNING_KEY)",
        "`finetune registry pull`",
        "`publish`",
    ):
        assert words in err
    ask(tmp_path, "warn", public)
    assert finetune("pull", f"{NAME}@prod", "--into", tmp_path / "good")[0] == 0
    finetune("publish", tmp_path / "good", "--alias", "prod", "--sign-with", release)
    ask(tmp_path, "require", public)
    assert finetune("resolve", f"{NAME}@prod")[0] == 0

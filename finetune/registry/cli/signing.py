"""The verbs for signatures on the command line: keygen, verify-folder, forget."""

import argparse
import getpass
import os
import re
import sys
from pathlib import Path

from finetune.adapters.reference import AdapterRef
from finetune.core.outside_text import safe_line
from finetune.errors import TrustError
from finetune.registry.cli.printing import answer
from finetune.registry.cli.verbs import AddVerb
from finetune.registry.log.commits import current_actor
from finetune.registry.registry import AdapterRegistry
from finetune.registry.trust.key_files import KEY_VARIABLE, PASSPHRASE_VARIABLE, default_key_path, public_path
from finetune.registry.trust.signing import SigningKey


def add_verbs(add: AddVerb) -> None:
    """Add the parsers of these verbs."""
    keygen = add("keygen", _keygen, "make a key that signs published versions, and print its line for trust policies")
    keygen.add_argument("--name", metavar="WHO", help="name of its owner (default: user@host)")
    keygen.add_argument("--out", type=Path, metavar="PATH", help="private key (default: ~/.finetune/keys/WHO.pem)")
    keygen.add_argument(
        "--encrypt",
        action="store_true",
        help=f"encrypt it with the passphrase in ${PASSPHRASE_VARIABLE}, or else with one that you type",
    )
    folder = add("verify-folder", _verify_folder, "hash a pulled folder and check its signature, without a registry")
    folder.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder with manifest.json, and manifest.sig if signed"
    )
    forget = add("forget", _forget, "forget the newest seen entry of a log, as after the restore of a backup")
    forget.add_argument("name", metavar="NAME", help="ns/name")


def _keygen(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    name = args.name or re.sub(r"[^A-Za-z0-9._@-]", "-", current_actor())[:64]
    path = default_key_path(name) if args.out is None else args.out.expanduser()
    public = SigningKey.generate().save(path, name, passphrase=_new_passphrase() if args.encrypt else None)
    lines = [
        f"private key: {path} (keep it secret; sign with it: export {KEY_VARIABLE}={path})",
        f"public key:  {public_path(path)} (for the trust policy of your readers)",
        public.line,
    ]
    value = {"private": str(path), "public": str(public_path(path)), "id": public.id, "line": public.line}
    return answer(args, value, "\n".join(lines))


def _new_passphrase() -> str:
    passphrase = os.environ.get(PASSPHRASE_VARIABLE)
    if not passphrase:
        if not sys.stdin.isatty():
            raise TrustError(f"there is no terminal to type a passphrase. Give it in {PASSPHRASE_VARIABLE}.")
        passphrase = getpass.getpass("new passphrase: ")
        if passphrase != getpass.getpass("once more: "):
            raise TrustError("the two passphrases must be the same, and differ. No key was made: try again.")
    if not passphrase:
        raise TrustError("the passphrase must not be empty. No key was made: try again.")
    return passphrase


def _verify_folder(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    manifest, verdict = registry.guard.verify_folder(args.folder)
    asked = registry.guard.policy.of(manifest.namespace).signatures
    accepted = verdict.problem is None or (asked == "off" and not verdict.forged)
    value = {
        "name": manifest.full_name,
        "signed_by": verdict.signer,
        "signatures": asked,
        "accepted": accepted,
        "problem": verdict.problem,
    }
    signature = f"signed by {verdict.signer}" if verdict.problem is None else verdict.problem
    text = f"{manifest.full_name}: every byte matches its manifest; {signature} (the policy: {asked})"
    answer(args, value, safe_line(text))
    return 0 if accepted else 1


def _forget(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    full_name = AdapterRef.parse_name(args.name).full_name
    there_was = registry.guard.seen.forget(full_name)
    outcome = "forgotten" if there_was else "nothing was seen"
    return answer(args, {"name": full_name, "forgotten": there_was}, f"{outcome}: {full_name} in {registry.location}")

"""The verbs on the command line for other kinds of registries: mirror, fetch-oci."""

import argparse

from finetune.registry.cli.printing import answer, warn
from finetune.registry.cli.verbs import REF_HELP, AddVerb
from finetune.registry.registry import AdapterRegistry


def add_verbs(add: AddVerb) -> None:
    """Add the parsers of these verbs."""
    mirror = add("mirror", _mirror, "copy a version to the Hugging Face Hub, or to an OCI registry")
    mirror.add_argument("ref", metavar="REF", help=REF_HELP)
    where = mirror.add_mutually_exclusive_group(required=True)
    where.add_argument("--hub", metavar="OWNER/REPO", help="a repository of the Hugging Face Hub")
    where.add_argument("--hub-folder", metavar="FOLDER", help="a new folder, with the files for the hub")
    where.add_argument("--oci", metavar="HOST/REPOSITORY[:TAG]", help="an OCI registry (tag: the version's number)")
    mirror.add_argument("--public", action="store_true", help="make a missing repository of the hub public")
    fetch = add("fetch-oci", _fetch_oci, "download a version from an OCI registry into an adapter folder")
    fetch.add_argument("source", metavar="HOST/REPOSITORY@sha256:DIGEST", help="or HOST/REPOSITORY:TAG")
    fetch.add_argument("--into", required=True, metavar="FOLDER", help="folder to make")


def _mirror(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.resolve(args.ref)
    warn(version)
    if args.oci:
        from finetune.registry.transfer.oci import push_to_oci
        from finetune.registry.transfer.oci_client import OciRef

        done = push_to_oci(registry, version, OciRef.parse(args.oci))
        return answer(args, {"oci": str(done), "digest": f"sha256:{done.digest}"}, str(done))
    from finetune.registry.transfer.hub import upload_to_hub, write_hub_folder

    if args.hub_folder:
        path = str(write_hub_folder(registry, version, args.hub_folder))
        return answer(args, {"path": path}, path)
    commit = upload_to_hub(registry, version, args.hub, private=not args.public)
    text = f"{args.hub} at v{version.version} ({commit}) is {version.ref}"
    return answer(args, {"repo_id": args.hub, "revision": commit, "tag": f"v{version.version}"}, text)


def _fetch_oci(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    from finetune.registry.transfer.oci import fetch_from_oci
    from finetune.registry.transfer.oci_client import OciRef

    done = fetch_from_oci(OciRef.parse(args.source), args.into)
    return answer(args, {"path": args.into, "oci": str(done)}, f"{args.into} is {done}")

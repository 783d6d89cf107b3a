"""The verb that shows a version elsewhere: mirror, on the command line."""

import argparse

from finetune.registry.commands.printing import answer, warn
from finetune.registry.commands.verbs import REF_HELP, AddVerb
from finetune.registry.mirrors.hub import upload_to_hub, write_hub_folder
from finetune.registry.registry import AdapterRegistry


def add_verbs(add: AddVerb) -> None:
    """Adds the parsers of these verbs."""
    mirror = add("mirror", _mirror, "show a version on the Hugging Face Hub")
    mirror.add_argument("ref", metavar="REF", help=REF_HELP)
    where = mirror.add_mutually_exclusive_group(required=True)
    where.add_argument("--hub", metavar="OWNER/REPO", help="a repository of the Hugging Face Hub")
    where.add_argument("--hub-folder", metavar="FOLDER", help="a new folder, with what the hub would hold")
    mirror.add_argument(
        "--public", action="store_true", help="a repository of the hub that is made now is for all to see"
    )


def _mirror(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.resolve(args.ref)
    warn(version)
    if args.hub_folder:
        path = str(write_hub_folder(registry, version, args.hub_folder))
        return answer(args, {"path": path}, path)
    commit = upload_to_hub(registry, version, args.hub, private=not args.public)
    told = f"{args.hub} at v{version.version} ({commit}) is {version.ref}"
    return answer(args, {"repo_id": args.hub, "revision": commit, "tag": f"v{version.version}"}, told)

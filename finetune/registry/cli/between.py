"""The verbs between registries on the command line: push, fetch, export-archive, import-archive."""

import argparse
from dataclasses import asdict

from finetune.core.outside_text import safe_line
from finetune.errors import NotFoundError
from finetune.registry.cli.printing import answer
from finetune.registry.cli.verbs import AddVerb
from finetune.registry.registry import AdapterRegistry
from finetune.registry.storage.location import is_registry
from finetune.registry.storage.store import Store
from finetune.registry.transfer.archive import export_archive, open_archive
from finetune.registry.transfer.copying import copy_adapters, names_in


def add_verbs(add: AddVerb) -> None:
    """Add the parsers of these verbs."""
    push = add("push", _push, "copy adapters with their whole history into another registry")
    push.add_argument("--to", required=True, metavar="LOCATION", help="location of the other registry")
    fetch = add("fetch", _fetch, "copy adapters with their whole history from another registry")
    fetch.add_argument(
        "--from", required=True, dest="source", metavar="LOCATION", help="location of the other registry"
    )
    export = add("export-archive", _export, "write adapters with their whole history into one file, a tar")
    export.add_argument("--to", required=True, metavar="FILE", help="the file to make")
    for parser in (push, fetch, export):
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("names", nargs="*", default=[], metavar="NAME", help="ns/name; repeatable")
        which.add_argument("--all", action="store_true", help="all adapters of the registry")
    importing = add("import-archive", _import, "add the adapters of such a file, after a check of the whole file")
    importing.add_argument("file", metavar="FILE", help="file that export-archive wrote")


def _push(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    return _copy(args, registry, AdapterRegistry(args.to))


def _fetch(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    return _copy(args, AdapterRegistry(args.source), registry)


def _copy(args: argparse.Namespace, source: AdapterRegistry, target: AdapterRegistry) -> int:
    return _report(args, source.store, target.store, _names(args, source))


def _export(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    done = export_archive(registry.store, _names(args, registry), args.to)
    lines = [
        f"{done.path}: {len(done.names)} adapters, {done.entries} entries, {done.bytes} bytes",
        f"sha256:{done.sha256}",
    ]
    return answer(args, asdict(done), "\n".join(lines))


def _import(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    with open_archive(args.file) as source:
        return _report(args, source, registry.store, names_in(source))


def _names(args: argparse.Namespace, registry: AdapterRegistry) -> list[str]:
    if not is_registry(registry.store):
        raise NotFoundError(f"there is no registry at {registry.location}. Check the location.")
    return names_in(registry.store) if args.all else args.names


def _report(args: argparse.Namespace, source: Store, target: Store, names: list[str]) -> int:
    copied, refused = copy_adapters(source, target, names)
    lines = [
        f"{done.name}: {done.entries} entries, {done.versions} versions, {done.blobs} files, {done.bytes} bytes"
        if done.entries
        else f"{done.name}: nothing new"
        for done in copied
    ]
    lines += [f"refused: {safe_line(str(error))}" for error in refused]
    value = {"copied": [asdict(done) for done in copied], "refused": [str(error) for error in refused]}
    answer(args, value, "\n".join(lines) or "there are no adapters")
    return 1 if refused else 0

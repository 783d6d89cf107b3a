"""The body of ``finetune registry``: words of the command line in, tables or JSON out."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from finetune.adapters.reference import LATEST
from finetune.registry.admin import verify
from finetune.registry.commits import Commit
from finetune.registry.registry import AdapterRegistry
from finetune.registry.versions import Version


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Adds ``registry`` and its subcommands; the parsed arguments hold ``run`` as ``args.run``."""
    parser = subparsers.add_parser(
        "registry",
        help="publish, find and fetch adapters",
        description="Publish, find and fetch adapters, and move the aliases by which they are asked for.",
    )
    parser.set_defaults(run=run)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--registry",
        metavar="LOCATION",
        help="folder of the registry (default: $FINETUNE_REGISTRY, or ~/.finetune/registry)",
    )
    common.add_argument("--json", action="store_true", help="print one JSON value instead of text")

    def add(verb: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".", parents=[common])

    publish = add("publish", "publish an adapter folder as the next version of its name")
    publish.add_argument("folder", metavar="FOLDER", help="holds manifest.json and the files that it lists")
    publish.add_argument("--name", metavar="NS/NAME", help="refuse when the manifest says another name")
    publish.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="ALIAS",
        help="let it stand for this version too; repeatable",
    )
    ref_help = "ns/name, ns/name@17, ns/name@prod or ns/name@sha256:<hex>"
    add("resolve", "show which version a reference means").add_argument("ref", metavar="REF", help=ref_help)
    pull = add("pull", "fetch a version into a folder, every byte checked, and print the folder")
    pull.add_argument("ref", metavar="REF", help=ref_help)
    pull.add_argument("--into", metavar="FOLDER", help="folder to make (default: one in the cache)")
    listing = add("list", "list the latest version of every adapter")
    listing.add_argument("namespace", nargs="?", metavar="NAMESPACE", help="only those in it")
    listing.add_argument("--all", action="store_true", help="list every version, the yanked ones too")
    add("log", "show all that happened to an adapter").add_argument("name", metavar="NAME", help="ns/name")
    alias = add("alias", "let an alias stand for a version")
    alias.add_argument("name", metavar="NAME", help="ns/name")
    alias.add_argument("alias", metavar="ALIAS", help="such as prod")
    alias.add_argument("target", metavar="TARGET", help="number of a version, or another alias")
    rollback = add("rollback", "move an alias back to the version that it stood for before")
    rollback.add_argument("name", metavar="NAME", help="ns/name")
    rollback.add_argument("alias", metavar="ALIAS", help="such as prod")
    rollback.add_argument("--to", metavar="TARGET", help="number of a version, or another alias, instead")
    for verb in (alias, rollback):
        verb.add_argument(
            "--expect",
            type=int,
            metavar="VERSION",
            help="refuse unless it stands for this version now; 0: for none",
        )
    yank = add("yank", "mark a version as not to be used any more; it stays, and latest passes it over")
    yank.add_argument("ref", metavar="REF", help="ns/name@17")
    how = yank.add_mutually_exclusive_group()
    how.add_argument("--reason", metavar="TEXT", help="shown to whoever still asks for it")
    how.add_argument("--undo", action="store_true", help="take the mark away again")
    add("verify", "hash everything that is published, and check every log")
    return parser


def run(args: argparse.Namespace) -> int:
    """Does what ``finetune registry ...`` asks, and prints the answer.

    Returns:
        The exit code: 0, or 1 when ``verify`` found problems.

    Raises:
        FinetuneError: it cannot be done.
    """
    return _VERBS[args.verb](AdapterRegistry(args.registry), args)


def _publish(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.publish(args.folder, args.name, aliases=args.alias)
    return _answer(args, _version_json(version), f"published {_one_line(version)}")


def _resolve(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.resolve(args.ref)
    _warn(version)
    rows = [
        ["ref", version.ref],
        ["digest", f"sha256:{version.digest}"],
        ["aliases", ", ".join(version.aliases)],
        ["published", f"{version.time} by {version.actor}"],
        *([key, _flat(value)] for key, value in version.summary.items()),
    ]
    return _answer(args, _version_json(version), _table(rows))


def _pull(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.resolve(args.ref)
    _warn(version)
    path = str(registry.pull(version, args.into))
    return _answer(args, {"path": path}, path)


def _list(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    versions = registry.list(args.namespace, all_versions=args.all)
    rows = [["REF", "ALIASES", "METHOD", "TASK", "PUBLISHED", "BY", "YANKED"]]
    for v in versions:
        method, task = v.summary.get("method"), v.summary.get("task")
        rows.append([v.ref, ", ".join(v.aliases), _flat(method), _flat(task), v.time, v.actor, v.yanked or ""])
    where = f"namespace {args.namespace!r} of {registry.location}" if args.namespace else registry.location
    nothing = f"no adapters in {where}; `finetune registry publish FOLDER` adds one"
    return _answer(args, [_version_json(v) for v in versions], _table(rows) if versions else nothing)


def _log(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    commits = registry.log(args.name)
    rows = [["SEQ", "OP", "VERSION", "ALIASES AFTER", "YANKED AFTER", "TIME", "BY"]]
    for c in commits:
        yanked = ", ".join(sorted(c.yanked, key=int)) or "-"
        rows.append([str(c.seq), c.op, str(c.version), _aliases(c), yanked, c.time, c.actor])
    return _answer(args, [c.model_dump(mode="json") for c in commits], _table(rows))


def _alias(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.alias(args.name, args.alias, args.target, expect=args.expect)
    return _answer(args, _version_json(version), f"{args.alias} -> {_one_line(version)}")


def _rollback(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.rollback(args.name, args.alias, args.to, expect=args.expect)
    return _answer(args, _version_json(version), f"{args.alias} -> {_one_line(version)}")


def _yank(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    if args.undo:
        version = registry.unyank(args.ref)
        return _answer(args, _version_json(version), f"no longer yanked: {_one_line(version)}")
    version = registry.yank(args.ref, reason=args.reason)
    lines = [f"yanked {version.ref}: {version.yanked}"]
    for alias in version.aliases:
        if alias == LATEST:
            lines.append("every version is yanked now, so latest cannot be asked for until another is published")
        else:
            lines.append(
                f"{alias} stands for it and cannot be asked for until it is moved: "
                f"finetune registry rollback {version.full_name} {alias}"
            )
    return _answer(args, _version_json(version), "\n".join(map(_printable, lines)))


def _verify(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    report = verify(registry)
    summary = f"{report.objects} objects, {report.bytes} bytes, {len(report.problems)} problems"
    _answer(args, vars(report), "\n".join([*map(_printable, report.problems), summary]))
    return 1 if report.problems else 0


_VERBS: dict[str, Callable[[AdapterRegistry, argparse.Namespace], int]] = {
    "publish": _publish,
    "resolve": _resolve,
    "pull": _pull,
    "list": _list,
    "log": _log,
    "alias": _alias,
    "rollback": _rollback,
    "yank": _yank,
    "verify": _verify,
}


def _answer(args: argparse.Namespace, value: Any, text: str) -> int:
    print(json.dumps(value, indent=2) if args.json else text)
    return 0


def _warn(version: Version) -> None:
    if version.warning:
        print(f"warning: {_printable(version.warning)}", file=sys.stderr)


def _version_json(version: Version) -> dict[str, Any]:
    return {"ref": version.ref, **vars(version), "warning": version.warning}


def _one_line(version: Version) -> str:
    return f"{version.ref} (aliases: {', '.join(version.aliases)}; sha256:{version.digest})"


def _aliases(commit: Commit) -> str:
    return ", ".join(f"{alias}={version}" for alias, version in sorted(commit.aliases.items()))


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_flat(part)}" for key, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _printable(text: str) -> str:
    # What others wrote into a registry must not reach a terminal as control characters.
    return "".join(c if c.isprintable() else "?" for c in text)


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)

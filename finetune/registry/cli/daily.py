"""The daily verbs on the command line: publish, resolve, pull, list, log, alias, rollback, yank."""

import argparse
import sys

from finetune.adapters.reference import LATEST
from finetune.core.outside_text import safe_line
from finetune.registry.cli.printing import answer, flat, one_line, table, version_json, warn
from finetune.registry.cli.verbs import REF_HELP, AddVerb, add_signing
from finetune.registry.log.commits import Commit
from finetune.registry.log.conditions import EXAMPLE
from finetune.registry.registry import AdapterRegistry


def add_verbs(add: AddVerb) -> None:
    """Add the parsers of these verbs."""
    publish = add("publish", _publish, "publish an adapter folder as the next version of its name")
    publish.add_argument("folder", metavar="FOLDER", help="folder with manifest.json and the files that it lists")
    publish.add_argument("--name", metavar="NS/NAME", help="refuse when the manifest has another name")
    publish.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="ALIAS",
        help="alias to move to this version; repeatable",
    )
    add("resolve", _resolve, "show which version a reference means").add_argument("ref", metavar="REF", help=REF_HELP)
    pull = add("pull", _pull, "fetch a version into a folder, every byte checked, and print the folder")
    pull.add_argument("ref", metavar="REF", help=REF_HELP)
    pull.add_argument("--into", metavar="FOLDER", help="folder to make (default: one in the cache)")
    listing = add("list", _list, "list the latest version of every adapter")
    listing.add_argument("namespace", nargs="?", metavar="NAMESPACE", help="list only adapters in this namespace")
    listing.add_argument(
        "--base", metavar="BASE", help="list only adapters of this base: its hub id, or the beginning of its digest"
    )
    listing.add_argument("--task", metavar="TASK", help="list only adapters for this task")
    listing.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="CONDITION",
        help=f"list only adapters that meet it, such as '{EXAMPLE}'; repeatable",
    )
    listing.add_argument("--all", action="store_true", help="list every version, also yanked ones")
    add("log", _log, "show all log entries of an adapter").add_argument("name", metavar="NAME", help="ns/name")
    alias = add("alias", _alias, "move an alias to a version")
    alias.add_argument("name", metavar="NAME", help="ns/name")
    alias.add_argument("alias", metavar="ALIAS", help="such as prod")
    alias.add_argument("target", metavar="TARGET", help="number of a version, or another alias")
    rollback = add("rollback", _rollback, "move an alias back to the version before")
    rollback.add_argument("name", metavar="NAME", help="ns/name")
    rollback.add_argument("alias", metavar="ALIAS", help="such as prod")
    rollback.add_argument("--to", metavar="TARGET", help="number of a version, or another alias, to move it to instead")
    for parser in (alias, rollback):
        parser.add_argument(
            "--expect",
            type=int,
            metavar="VERSION",
            help="refuse unless the alias points to this version now; 0: no such alias",
        )
    yank = add("yank", _yank, "withdraw a version; its files stay, and latest skips it")
    yank.add_argument("ref", metavar="REF", help="ns/name@17")
    how = yank.add_mutually_exclusive_group()
    how.add_argument("--reason", metavar="TEXT", help="reason for users who still resolve it")
    how.add_argument("--undo", action="store_true", help="undo the yank")
    for parser in (publish, alias, rollback, yank):
        add_signing(parser)


def _publish(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.publish(args.folder, args.name, aliases=args.alias)
    note = f"\n{version.note}" if version.note else ""
    return answer(args, version_json(version), f"published {one_line(version)}{note}")


def _resolve(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.resolve(args.ref)
    warn(version)
    rows = [
        ["ref", version.ref],
        ["digest", f"sha256:{version.digest}"],
        ["aliases", ", ".join(version.aliases)],
        ["published", f"{version.time} by {version.actor}"],
        *([key, flat(value)] for key, value in version.summary.items()),
    ]
    return answer(args, version_json(version), table(rows))


def _pull(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.resolve(args.ref)
    warn(version)
    path = str(registry.pull(version, args.into))
    return answer(args, {"path": path}, path)


def _list(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    unreadable: list[str] = []
    versions = registry.list(
        args.namespace,
        base=args.base,
        task=args.task,
        metric=args.metric,
        all_versions=args.all,
        onerror=lambda name, error: unreadable.append(f"{name} cannot be read: {error}"),
    )
    rows = [["REF", "ALIASES", "METHOD", "TASK", "PUBLISHED", "BY", "YANKED"]]
    for v in versions:
        method, task = v.summary.get("method"), v.summary.get("task")
        rows.append([v.ref, ", ".join(v.aliases), flat(method), flat(task), v.time, v.actor, v.yanked or ""])
    where = f"namespace {args.namespace!r} of {registry.location}" if args.namespace else registry.location
    nothing = f"no adapters in {where}; `finetune registry publish FOLDER` adds one"
    if args.base or args.task or args.metric:
        nothing = f"no adapters in {where} meet the conditions"
    elif unreadable:
        nothing = f"no adapters in {where} can be read"
    answer(args, [version_json(v) for v in versions], table(rows) if versions else nothing)
    for problem in unreadable:
        print(safe_line(problem), file=sys.stderr)
    return 1 if unreadable else 0


def _log(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    commits = registry.log(args.name)
    namespace, name = args.name.split("/")
    signers = [registry.guard.verify_entry(namespace, name, c).signer for c in commits]
    about = [concerned(before, c) for before, c in zip([None, *commits], commits, strict=False)]
    rows = [["SEQ", "OP", "VERSION", "ALIASES AFTER", "YANKED AFTER", "TIME", "BY", "REQUIRED", "SIGNED BY"]]
    for c, version, signer in zip(commits, about, signers, strict=True):
        yanked = ", ".join(sorted(c.yanked, key=int)) or "-"
        rows.append([str(c.seq), c.op, str(version), _aliases(c), yanked, c.time, c.actor, _gate(c), signer])
    shown = [
        c.model_dump(mode="json") | {"concerns": version, "signed_by": signer}
        for c, version, signer in zip(commits, about, signers, strict=True)
    ]
    return answer(args, shown, table(rows))


def _alias(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.alias(args.name, args.alias, args.target, expect=args.expect)
    return answer(args, version_json(version), f"{args.alias} -> {one_line(version)}")


def _rollback(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    version = registry.rollback(args.name, args.alias, args.to, expect=args.expect)
    return answer(args, version_json(version), f"{args.alias} -> {one_line(version)}")


def _yank(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    if args.undo:
        version = registry.unyank(args.ref)
        return answer(args, version_json(version), f"no longer yanked: {one_line(version)}")
    version = registry.yank(args.ref, reason=args.reason)
    lines = [f"yanked {version.ref}: {version.yanked}"]
    for alias in version.aliases:
        if alias == LATEST:
            lines.append("every version is yanked now, so latest cannot be resolved until you publish another version")
        else:
            lines.append(
                f"{alias} points to it and cannot be resolved until you move it: "
                f"finetune registry alias {version.full_name} {alias} VERSION"
            )
    return answer(args, version_json(version), "\n".join(map(safe_line, lines)))


def concerned(before: Commit | None, commit: Commit) -> int:
    """Return the version that an entry changes: the published or yanked one, or the new target of an alias.

    Args:
        before: the entry before; None for the first.
        commit: the entry, whose own ``version`` is the newest one.
    """
    if before is None or commit.op == "publish":
        return commit.version
    if commit.op in ("yank", "unyank"):
        changed = commit.yanked.keys() ^ before.yanked.keys() or commit.yanked.keys()
        return max(map(int, changed), default=commit.version)
    moved = [version for alias, version in commit.aliases.items() if before.aliases.get(alias) != version]
    named = [commit.aliases[alias] for alias in commit.expect if alias in commit.aliases]
    return next(iter([*moved, *named]), commit.version)


def _aliases(commit: Commit) -> str:
    return ", ".join(f"{alias}={version}" for alias, version in sorted(commit.aliases.items()))


def _gate(commit: Commit) -> str:
    if commit.gate is None:
        return ""
    return "; ".join([*commit.gate.required, *(f"FORCED past {unmet}" for unmet in commit.gate.forced)])

"""The verb ``finetune registry warm``: load adapters ahead, so that later loads find the receipts of their probes."""

import argparse
from dataclasses import asdict

from finetune.adapters.base_check import check_base
from finetune.adapters.requirements import require_usable
from finetune.core.base_options import add_base_options
from finetune.core.extras import require_extra
from finetune.core.quick_imports import quick_imports
from finetune.registry import AdapterRegistry
from finetune.registry.cli.printing import answer
from finetune.registry.cli.verbs import REF_HELP, AddVerb
from finetune.serving.known_bases import find_base


def add_verbs(add: AddVerb) -> None:
    """Add the parser of the verb."""
    warm = add(
        "warm", _warm, "load and check adapters on their base ahead, so that later loads on this machine are quick"
    )
    warm.add_argument("refs", nargs="+", metavar="REF", help=REF_HELP)
    warm.add_argument("--base", help="folder, hub id or embedded name of the base (default: where it was last seen)")
    add_base_options(warm)


def _warm(registry: AdapterRegistry, args: argparse.Namespace) -> int:
    require_extra("torch", what="registry warm")
    versions = {ref: registry.resolve(ref) for ref in dict.fromkeys(args.refs)}
    for ref in versions:
        manifest = registry.read(ref)[0]
        require_usable(manifest)
        check_base(args.base or find_base(manifest.base), revision=None if args.base else manifest.base.revision)
    with quick_imports():
        from finetune.serving.loading import load

    held = {"device": args.device, "dtype": args.dtype, "quantization": args.quantization}
    found, vlm = [], None
    for ref, version in versions.items():
        vlm = load(ref, registry=registry, base=args.base, **held)  # shares the weights of the model before it
        assert vlm.adapter is not None
        found.append({"ref": ref, "version": version.ref, **asdict(vlm.adapter.probe)})
    lines = (f"{one['version']}: {one['verdict']}, its effect differs by {one['difference']:.2%}" for one in found)
    return answer(args, found, "\n".join(lines))

"""The body of ``finetune export``: it reads the command line and prints the comparisons. Loads no torch by itself."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from finetune.core.base_options import add_quantization
from finetune.core.outside_text import safe_block, safe_line
from finetune.core.quick_imports import quick_imports
from finetune.errors import ExportError
from finetune.export.choosing import NO_ADAPTER, check_choice, check_quantization
from finetune.plugins import names
from finetune.preflight import check_adapter
from finetune.tables import EXPORT_OPTIONS

_ABOUT = """\
Write an adapter in the format of another program, and check that it has the same effect there. The command reads the
files back, and compares their outputs on the probe of the manifest with those of the adapter on its base. For that it
loads the base in float32 (4 bytes per parameter). The folder appears complete, with the verdict in export.json, or not
at all."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the parser of ``export``."""
    parser = subparsers.add_parser(
        "export",
        help="write an adapter in the format of another program, and check it there",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ref", metavar="REF", help="registry reference, such as medical/brain-mri@prod, or a folder")
    parser.add_argument(
        "--to", required=True, metavar="TARGET", help=f"target of the export: {' | '.join(sorted(names('exports')))}"
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder to make (default: exports/NS-NAME-TARGET)")
    parser.add_argument(
        "--registry", metavar="LOCATION", help="folder or URL of the registry (default: $FINETUNE_REGISTRY)"
    )
    parser.add_argument("--base", help="folder, hub id or embedded name of the base (default: its last folder)")
    parser.add_argument("--revision", help="revision of the base's hub id")
    parser.add_argument("--device", default="cpu", help="device of the base: auto, cpu, cuda or mps (cpu)")
    add_quantization(parser)
    parser.add_argument("--json", action="store_true", help="print the contents of export.json instead of text")
    parser.set_defaults(run=run)
    own = parser.add_argument_group("options of single targets")

    def add(name: str, text: str, **how: Any) -> None:
        taken = ", ".join(sorted(EXPORT_OPTIONS[name]))
        flag = f"--{name.replace('_', '-')}"
        own.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=f"{taken}: {text}", **how)

    add("bake_scaling", "multiply LoRA's scaling into B: lora_alpha == r, no rslora, no patterns", action="store_true")
    add(
        "dtype",
        "dtype of the weights: float32 or float16; merged also takes bfloat16, or auto (its default) for the dtype of "
        "the base's config, else of its files",
        metavar="DTYPE",
    )
    add("max_shard_size", "maximum size of a file of weights, such as 500MB (5GB)", metavar="SIZE")
    add("max_lora_rank", "--max-lora-rank of vLLM (16)", type=int, metavar="R")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune export ...``, and print the comparisons.

    Returns:
        The exit code: 0.

    Raises:
        FinetuneError: the export cannot be done.
    """
    options = {name: getattr(args, name) for name in EXPORT_OPTIONS if hasattr(args, name)}
    check_choice(args.to, options)  # before torch is loaded
    check_quantization(args.to, args.quantization)
    if args.ref == "base":
        raise ExportError(NO_ADAPTER)
    if args.output is not None:
        from finetune.export.output import refuse_occupied

        refuse_occupied(Path(args.output).expanduser().absolute())
    check_adapter(args.ref, base=args.base, revision=args.revision, registry=args.registry)
    with quick_imports():
        from finetune.export.exporting import export_adapter

    def show(message: Warning | str, *where: object) -> None:
        print(f"warning: {safe_line(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        done = export_adapter(
            args.ref,
            to=args.to,
            output=args.output,
            registry=args.registry,
            base=args.base,
            revision=args.revision,
            device=args.device,
            quantization=args.quantization,
            log=lambda text: print(safe_block(text), file=sys.stderr if args.json else sys.stdout),
            **options,
        )
    print(json.dumps({"folder": str(done.folder), **done.record}, indent=2) if args.json else f"{done.folder}: done")
    return 0

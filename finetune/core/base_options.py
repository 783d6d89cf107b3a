"""Command-line options for the device, dtype and quantization of the base, the same in each command."""

import argparse

QUANTIZATIONS = ("4bit", "8bit")
_QUANTIZATION = "of the base's language tower, whatever an adapter was trained on (default: none)"


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--dtype`` and ``--quantization``, as ``finetune.load`` takes them."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="float32", help="what the base is held in, or auto: as its config says")
    add_quantization(parser)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Add ``--quantization`` alone."""
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help=_QUANTIZATION)

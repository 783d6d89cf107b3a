"""Command-line options for the device, dtype and quantization of the base, the same in each command."""

import argparse

QUANTIZATIONS = ("4bit", "8bit")
_QUANTIZATION = "quantization of the base's language tower, independent of the adapter's training (default: none)"


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--dtype`` and ``--quantization``, as ``finetune.load`` takes them."""
    parser.add_argument("--device", default="auto", help="device of the base: auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="float32", help="dtype of the base's weights; auto takes it from the config")
    add_quantization(parser)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Add ``--quantization`` alone."""
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help=_QUANTIZATION)

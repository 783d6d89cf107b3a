"""Evaluate adapters side by side on one base, and print one table.

    python recipes/evaluate.py REF [REF ...] --on CONFIG [CONFIG ...] [--json FILE] [--rows FILE]
    python recipes/evaluate.py REF [REF ...] --data FILE

The same as `finetune evaluate`, whose --help lists the options. From Python: finetune.evaluate(refs, recipes).
"""

import sys

from finetune.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

"""Write an adapter in the form of another program, and check that it does there what it does here.

    python recipes/export.py REF --to peft | merged [--output FOLDER] [OPTION ...]

The same as `finetune export`, whose --help lists the options. From Python: finetune.export_adapter(REF, to=...).
"""

import sys

from finetune.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))

"""Train an adapter by a recipe, evaluate it, save it and publish it.

    accelerate launch recipes/train.py CONFIG.yaml [key=value ...]
    ./launch.sh CONFIG.yaml [key=value ...]        (sets the environment up first)

Prints the scores of the frozen base and of the adapter on the test rows, and the published reference. Ctrl-C or
SIGTERM stops after the present step and saves the state (exit code 130 or 143); the same command then continues.
"""

import sys

from finetune.launch.processes import exit_code_of_process
from finetune.runs.command import train_config


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    return exit_code_of_process(lambda: train_config(argv[0], argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

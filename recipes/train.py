"""Train an adapter as a recipe says, judge it, save it and publish it.

    accelerate launch recipes/train.py CONFIG.yaml [key=value ...]
    ./launch.sh CONFIG.yaml [key=value ...]        (sets the environment up first)

Prints the scores of the frozen base and of the adapter on the test rows, and the published reference.
"""

import sys

from finetune.errors import FinetuneError
from finetune.recipe import load_recipe
from finetune.runs import train


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        train(load_recipe(argv[0], argv[1:]))
    except FinetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Train an adapter as a recipe says, judge it, save it and publish it.

    accelerate launch recipes/train.py CONFIG.yaml [key=value ...]
    ./launch.sh CONFIG.yaml [key=value ...]        (sets the environment up first)

Prints the scores of the frozen base and of the adapter on the test rows, and the published reference. Ctrl-C or
SIGTERM stops after the step at hand with the state saved (exit code 130 or 143); the same command then goes on.
"""

import signal
import sys

from finetune.errors import FinetuneError, StoppedError
from finetune.recipe import load_recipe
from finetune.runs import train


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        train(load_recipe(argv[0], argv[1:]))
    except StoppedError as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("stopped outside training: nothing was lost. The same command goes on.", file=sys.stderr)
        return 128 + signal.SIGINT
    except FinetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Load a base and answer one question about one image: BASE IMAGE QUESTION NUM_TOKENS."""

from __future__ import annotations

import sys

from PIL import Image

from benchmarks.floors.answering import Answering

if __name__ == "__main__":
    base, image, question, num_tokens = sys.argv[1:]
    print(Answering(base).answer(Image.open(image), question, num_tokens=int(num_tokens)))

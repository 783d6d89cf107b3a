"""Where rows come from."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.section import PositiveInt, Section


class JsonlData(Section):
    """Rows in JSON Lines files beside their pictures."""

    source: Literal["jsonl"]
    root: str  # folder that the files and the pictures' paths are relative to
    train: str = "train.jsonl"
    val: str | None = "val.jsonl"
    test: str | None = "test.jsonl"
    image: str = "image"  # field names in a row
    question: str = "question"
    answer: str = "answer"
    kind: str | None = None  # field that names the question type; None: the question, where there are a few
    max_rows: dict[Literal["train", "val", "test"], PositiveInt] = {}  # the first rows by a seeded shuffle
    max_image_pixels: PositiveInt = 50_000_000


class ProceduralData(Section):
    """Rows drawn by a program from a seed: synthetic, for the demo and for tests."""

    source: Literal["procedural"]
    name: Literal["medical", "retail"]
    seed: int = 0
    rows: dict[Literal["train", "val", "test"], PositiveInt] = {"train": 2000, "val": 200, "test": 800}


DataSection = Annotated[JsonlData | ProceduralData, Field(discriminator="source")]

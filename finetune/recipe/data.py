"""Where rows come from, what their fields are called, and what is done with rows that do not fit."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finetune.recipe.section import PositiveInt, Section

Split = Literal["train", "val", "test"]


class RowsSection(Section):
    """What every source has."""

    max_length: PositiveInt | None = None
    """Tokens of a row, its pictures' included; None: as many as the base takes."""
    too_long: Literal["error", "drop"] = "error"
    """Rows over max_length; a row is never cut."""

    @property
    def synthetic(self) -> bool:
        """Whether no row stands for anything real."""
        return False


class ReadSection(RowsSection):
    """What every source has whose rows were written by somebody."""

    supervise: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are learnt."""
    on_error: Literal["error", "skip"] = "error"
    """Rows that cannot be used; at most 5 % may be skipped."""
    max_image_pixels: PositiveInt = 50_000_000
    """Cap on width x height."""


class ColumnData(ReadSection):
    """What a row's fields are called; a field that is null here is not looked for.

    A row is a conversation (``messages``), a choice of captions (``captions``), or a question with its answer.
    """

    image: str | None = "image"
    images: str | None = "images"
    """A list; where a row has it, it stands for ``image``."""
    question: str | None = "question"
    answer: str | None = "answer"
    """A text, or a list of all that count as right, of which the first is learnt."""
    captions: str | None = "captions"
    """A list, of which each epoch learns one."""
    messages: str | None = "messages"
    """A conversation in Hugging Face's chat format."""
    kind: str | None = None
    """Names the question type; null: the question, where there are a few."""
    id: str | None = None
    """Null: where the row stands."""
    default_question: str | None = None
    """Put where a row has none of its own."""
    max_rows: dict[Split, PositiveInt] = {}
    """The first rows by a seeded shuffle."""


class JsonlData(ColumnData):
    """Rows in JSON Lines files beside their pictures."""

    source: Literal["jsonl"]
    root: str
    """Folder that the files and the pictures' paths are relative to."""
    train: str = "train.jsonl"
    val: str | None = "val.jsonl"
    test: str | None = "test.jsonl"


class ParquetData(ColumnData):
    """Rows in Parquet files that hold their pictures, as Hugging Face's datasets writes them."""

    source: Literal["parquet"]
    root: str
    """Folder that the files are relative to."""
    train: str = "train*.parquet"
    """One file, or a pattern for several."""
    val: str | None = "val*.parquet"
    test: str | None = "test*.parquet"


class SavedData(ColumnData):
    """A folder that ``datasets`` saved with ``save_to_disk``."""

    source: Literal["saved"]
    root: str
    train: str = "train"
    """Folder below root, as a DatasetDict has one a split; "." where root is a single Dataset."""
    val: str | None = "validation"
    test: str | None = "test"


class HubData(ColumnData):
    """A data set of the Hugging Face hub."""

    source: Literal["hub"]
    name: str
    """Such as flaviagiammarino/vqa-rad."""
    revision: str | None = None
    config: str | None = None
    """Of a data set that has several."""
    root: str | None = None
    """A folder with the files of the data set, where the hub cannot be reached."""
    train: str = "train"
    """A split, or a slice such as train[:90%]."""
    val: str | None = "validation"
    test: str | None = "test"


class ProceduralData(RowsSection):
    """Rows drawn by a program from a seed: synthetic, for the demo and for tests."""

    source: Literal["procedural"]
    name: Literal["medical", "retail"]
    seed: int = 0
    rows: dict[Split, PositiveInt] = {"train": 2000, "val": 200, "test": 800}

    @property
    def synthetic(self) -> bool:
        """Whether no row stands for anything real."""
        return True


class Weighted(Section):
    """One source of a mix."""

    weight: Annotated[float, Field(gt=0)] = 1
    """Its share of an epoch, relative to the others' weights."""
    data: Annotated[
        JsonlData | ParquetData | SavedData | HubData | ProceduralData,
        Field(discriminator="source"),
    ]


class MixData(ReadSection):
    """Several sources; what holds for all rows is said once, here.

    Training sees every row of every source at least once an epoch, and repeats the rows of a source whose weight is
    larger than its size; validation and test see every row once.
    """

    source: Literal["mix"]
    sources: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?$")], Weighted], Field(min_length=1)
    ]

    @model_validator(mode="after")
    def _says_it_once(self) -> "MixData":
        for name, part in self.sources.items():
            twice = sorted(part.data.model_fields_set & ReadSection.model_fields.keys())
            if twice:
                raise ValueError(f"{', '.join(twice)} of {name} holds for the whole mix: set data.{twice[0]}")
        return self

    @property
    def synthetic(self) -> bool:
        """Whether no row stands for anything real."""
        return all(part.data.synthetic for part in self.sources.values())

    def part(self, name: str) -> Any:
        """Returns the section of one source, with what holds for the whole mix."""
        section = self.sources[name].data
        common = ReadSection.model_fields.keys() & type(section).model_fields.keys()
        return section.model_copy(update={field: getattr(self, field) for field in common})


DataSection = Annotated[
    JsonlData | ParquetData | SavedData | HubData | MixData | ProceduralData, Field(discriminator="source")
]

"""Where rows come from, what their fields are called, and what is done with rows that do not fit."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from finetune.recipe.chosen import Choice
from finetune.recipe.section import Place, PositiveInt, Prompt, Section, Seed

Split = Literal["train", "val", "test"]


class RowsSection(Section):
    """A source of rows; the base of every source's own section."""

    source: str
    """Where rows come from."""

    max_length: PositiveInt | None = None
    """Most tokens of a row, those of its images included; by default as many as the base takes."""
    too_long: Literal["error", "drop"] = "error"
    """What is done with longer rows; none is ever cut."""

    @property
    def synthetic(self) -> bool:
        """Whether no row stands for anything real."""
        return False


class ReadSection(RowsSection):
    """What every source has whose rows were written by somebody."""

    supervise: Literal["all", "last"] = "all"
    """Which assistant turns are supervised; never one with ``weight`` 0, or with ``loss`` or ``train`` false."""
    on_error: Literal["error", "skip"] = "error"
    """What is done with rows that cannot be used; at most 5 % may be skipped."""
    max_image_pixels: PositiveInt = 50_000_000
    """Cap on width x height of an image."""
    image_range: Literal["auto", "file"] | Annotated[list[int], Field(min_length=2, max_length=2)] = "auto"
    """Values of images of more than 8 bits that become black and white: auto takes the smallest of 10, 12, 14 and 16
    bit that holds those of the train rows, file all 16 bits. The manifest keeps them."""
    image_page: PositiveInt | None = None
    """Page of TIFF files that have several, from 1. Of an animation the first frame is taken."""

    @field_validator("image_range")
    @classmethod
    def _grows(cls, value: str | list[int]) -> str | list[int]:
        if not isinstance(value, str) and value[0] >= value[1]:
            raise ValueError("image_range must be auto, file or [LOW, HIGH] with LOW below HIGH")
        return value


_COMMON = ReadSection.model_fields.keys() - {"source"}  # what a mix says once for all of its sources


class ColumnData(ReadSection):
    """What a row's fields are called; a field that is null here is not looked for.

    A row is a conversation (``messages``), a choice of captions (``captions``), or a question with its answer.
    """

    image: str | None = "image"
    """Field of the image."""
    images: str | None = "images"
    """Field of a list of images; where a row has it, it stands for ``image``."""
    question: str | None = "question"
    """Field of the question."""
    answer: str | None = "answer"
    """Field of the answer: a text, or a list of all that count as right, of which the first is supervised."""
    captions: str | None = "captions"
    """Field of a list of captions, of which each epoch trains on one."""
    messages: str | None = "messages"
    """Field of a conversation in Hugging Face's chat format."""
    system: str | None = "system"
    """Field of the system message; it stands for ``task.system_prompt`` in its row."""
    kind: str | None = None
    """Field that names the question type; null: the question itself, where there are a few."""
    id: str | None = None
    """Field that names the row; null: where it stands."""
    default_question: Prompt | None = None
    """What is asked where a row has no question."""
    ignore: list[str] = []
    """Fields that are left unread and unlisted, also those that would be refused, such as ``history``."""
    max_rows: dict[Split, PositiveInt] = {}
    """Takes only so many rows of a split, by a seeded shuffle."""

    @model_validator(mode="after")
    def _reads_what_it_ignores(self) -> "ColumnData":
        keys = ("image", "images", "question", "answer", "captions", "messages", "system", "kind", "id")
        for key in keys:
            if getattr(self, key) in self.ignore:
                raise ValueError(f"ignore holds {getattr(self, key)!r}, which data.{key} reads: set data.{key} to null")
        return self


class StreamableData(ColumnData):
    """Rows that need not all be read before the first step."""

    streaming: bool = False
    """Reads the train rows in a seeded order while the run trains on them; the length is then train.max_steps."""

    @model_validator(mode="after")
    def _streams_whole(self) -> "StreamableData":
        if self.streaming and "train" in self.max_rows:
            raise ValueError("max_rows.train does not go with streaming: train.max_steps says how many rows are read")
        return self


class JsonlData(ColumnData):
    """Rows in JSON Lines files beside their images."""

    source: Literal["jsonl"]
    """Where rows come from."""
    root: Place
    """Folder that the files and the images' paths are relative to."""
    train: Place = "train.jsonl"
    """The training rows."""
    val: Place | None = "val.jsonl"
    """The rows to choose the best weights on; null: none."""
    test: Place | None = "test.jsonl"
    """The rows to evaluate on; null: none."""


class ParquetData(StreamableData):
    """Rows in Parquet files that hold their images, as Hugging Face's datasets writes them."""

    source: Literal["parquet"]
    """Where rows come from."""
    root: Place
    """Folder that the files are relative to."""
    train: Place = "train*.parquet"
    """The training rows: one file, or a pattern for several."""
    val: Place | None = "val*.parquet"
    """The rows to choose the best weights on; null: none."""
    test: Place | None = "test*.parquet"
    """The rows to evaluate on; null: none."""


class SavedData(ColumnData):
    """A folder that ``datasets`` saved with ``save_to_disk``."""

    source: Literal["saved"]
    """Where rows come from."""
    root: Place
    """The folder that was saved."""
    train: Place = "train"
    """The training rows: a folder below root, as a DatasetDict has; ``.`` where root is a single Dataset."""
    val: Place | None = "validation"
    """The rows to choose the best weights on; null: none."""
    test: Place | None = "test"
    """The rows to evaluate on; null: none."""


class HubData(StreamableData):
    """A data set of the Hugging Face hub."""

    source: Literal["hub"]
    """Where rows come from."""
    name: str
    """Its id, such as flaviagiammarino/vqa-rad."""
    revision: str | None = None
    """Branch, tag or commit."""
    config: str | None = None
    """Which one, of a data set that has several."""
    root: Place | None = None
    """A folder with its files, where the hub cannot be reached."""
    train: str = "train"
    """The training rows: a split, or a slice such as train[:90%]."""
    val: str | None = "validation"
    """The rows to choose the best weights on; null: none."""
    test: str | None = "test"
    """The rows to evaluate on; null: none."""


class ProceduralData(RowsSection):
    """Rows drawn by a program from a seed: synthetic, for the demo and for tests."""

    source: Literal["procedural"]
    """Where rows come from."""
    name: Literal["medical", "retail"]
    """Which images are drawn."""
    seed: Seed = 0
    """What they are drawn from."""
    rows: dict[Split, PositiveInt] = {"train": 2000, "val": 200, "test": 800}
    """How many, by split."""

    @property
    def synthetic(self) -> bool:
        """Whether no row stands for anything real."""
        return True


class Weighted(Section):
    """One source of a mix."""

    weight: Annotated[float, Field(gt=0)] = 1
    """Its share of an epoch, relative to the others' weights."""
    data: Annotated[SerializeAsAny[RowsSection], Choice("sources", key="source", without=("mix",))]
    """The source."""


class MixData(ReadSection):
    """Several sources; what holds for all rows is said once, here.

    Training sees every row of every source at least once an epoch, and repeats the rows of a source whose weight is
    larger than its size; validation and test see every row once.
    """

    source: Literal["mix"]
    """Where rows come from."""
    sources: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?$")], Weighted], Field(min_length=1)
    ]
    """Name of a source -> its weight and where its rows come from."""

    @model_validator(mode="after")
    def _says_it_once(self) -> "MixData":
        for name, part in self.sources.items():
            if isinstance(part.data, StreamableData) and part.data.streaming:
                raise ValueError(f"{name} cannot be a stream: a mix repeats rows by their number. Set streaming: false")
            twice = sorted(part.data.model_fields_set & _COMMON)
            if twice:
                raise ValueError(f"{', '.join(twice)} of {name} holds for the whole mix: set data.{twice[0]}")
        return self

    @property
    def synthetic(self) -> bool:
        """Whether no row stands for anything real."""
        return all(part.data.synthetic for part in self.sources.values())

    def part(self, name: str) -> Any:
        """Return the section of one source, with what holds for the whole mix."""
        section = self.sources[name].data
        common = _COMMON & type(section).model_fields.keys()
        return section.model_copy(update={field: getattr(self, field) for field in common})


DataSection = Annotated[SerializeAsAny[RowsSection], Choice("sources", key="source")]

"""Sections of the recipe for data: the source of the rows, the names of their fields, and the rows that are used."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from finetune.recipe.chosen import Choice
from finetune.recipe.section import Place, PositiveInt, Prompt, Section, Seed

Split = Literal["train", "val", "test"]


class RowsSection(Section):
    """A source of rows; the base of every source's own section."""

    source: str
    """The name of the source."""

    max_length: PositiveInt | None = Field(default=None, examples=[2048])
    """Largest number of tokens of a row, those of its images included; by default as many as the base takes."""
    too_long: Literal["error", "drop"] = "error"
    """The treatment of longer rows: stop with an error, or leave them out. No row is ever cut."""

    @property
    def synthetic(self) -> bool:
        """True if all rows are synthetic, so that scores on them are no evidence about real images."""
        return False


class ReadSection(RowsSection):
    """The settings of every source that reads rows from files."""

    supervise: Literal["all", "last"] = "all"
    """The assistant turns that are supervised; never one with ``weight`` 0, or with ``loss`` or ``train`` false."""
    on_error: Literal["error", "skip"] = "error"
    """The treatment of rows that cannot be used: stop with an error, or skip them, at most 5 %."""
    max_image_pixels: PositiveInt = Field(default=50_000_000, examples=[4_000_000])
    """Largest width x height of an image, in pixels."""
    image_range: Literal["auto", "file"] | Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        default="auto", examples=[[0, 4095]]
    )
    """Values that become black and white in images of more than 8 bits. auto takes the smallest range of 10, 12, 14 and
    16 bits that holds all values of the train rows; file takes all 16 bits. The manifest keeps the range."""
    image_page: PositiveInt | None = Field(default=None, examples=[1])
    """Page of TIFF files that have several, from 1. Of an animation the first frame is taken."""

    @field_validator("image_range")
    @classmethod
    def _grows(cls, value: str | list[int]) -> str | list[int]:
        if not isinstance(value, str) and value[0] >= value[1]:
            raise ValueError(f"image_range must be auto, file or [LOW, HIGH] with LOW below HIGH, got {value}")
        return value


_COMMON = ReadSection.model_fields.keys() - {"source"}  # settings of a mix that hold for all of its sources


class ColumnData(ReadSection):
    """The names of a row's fields; a field that is null here is not read.

    A row is a conversation (``messages``), a choice of captions (``captions``), or a question with its answer.
    """

    image: str | None = Field(default="image", examples=["photo"])
    """Field that holds the image."""
    images: str | None = Field(default="images", examples=["slices"])
    """Field that holds a list of images; if a row has it, it replaces ``image``."""
    question: str | None = Field(default="question", examples=["prompt"])
    """Field that holds the question."""
    answer: str | None = Field(default="answer", examples=["label"])
    """Field that holds the answer: a text, or a list of all correct answers, of which the first is supervised."""
    captions: str | None = Field(default="captions", examples=["descriptions"])
    """Field that holds a list of captions; each epoch trains on one of them."""
    messages: str | None = Field(default="messages", examples=["conversation"])
    """Field that holds a conversation in Hugging Face's chat format."""
    system: str | None = Field(default="system", examples=["instructions"])
    """Field that holds the system message; it replaces ``task.system_prompt`` in its row."""
    question_type: str | None = Field(default=None, examples=["topic"])
    """Field that holds the question type; null: the question itself, if there are only a few questions."""
    id: str | None = Field(default=None, examples=["study_id"])
    """Field that holds the row's id; null: an id made of the row's place in the source."""
    default_question: Prompt | None = Field(default=None, examples=["What does the image show?"])
    """The question of rows that have none."""
    ignore: list[str] = Field(default=[], examples=[["history", "split"]])
    """Fields that are neither read nor listed, even if they would be refused otherwise, such as ``history``."""
    max_rows: dict[Split, PositiveInt] = Field(default={}, examples=[{"train": 5000, "val": 200}])
    """Largest number of rows of each split; a seeded shuffle chooses them."""

    @model_validator(mode="after")
    def _reads_what_it_ignores(self) -> "ColumnData":
        keys = ("image", "images", "question", "answer", "captions", "messages", "system", "question_type", "id")
        for key in keys:
            if getattr(self, key) in self.ignore:
                raise ValueError(
                    f"ignore must not list {getattr(self, key)!r}, because data.{key} reads this field. Set data.{key} "
                    "to null, or remove the field from ignore"
                )
        return self


class StreamableData(ColumnData):
    """The settings of a source whose rows can be read while the run trains."""

    streaming: bool = False
    """True to read the train rows in a seeded order during training; train.max_steps then sets the length."""

    @model_validator(mode="after")
    def _streams_whole(self) -> "StreamableData":
        if self.streaming and "train" in self.max_rows:
            raise ValueError(
                f"max_rows.train cannot be used with streaming, got {self.max_rows['train']}: train.max_steps sets "
                "how many rows are read. Remove max_rows.train"
            )
        return self


class JsonlData(ColumnData):
    """Rows in JSON Lines files beside their images."""

    source: Literal["jsonl"]
    """The name of the source."""
    root: Place = Field(examples=["data/clothing"])
    """Folder that the files and the images' paths are relative to."""
    train: Place = Field(default="train.jsonl", examples=["rows/train.jsonl"])
    """The file of the training rows."""
    val: Place | None = Field(default="val.jsonl", examples=["rows/val.jsonl"])
    """The file of the rows that choose the best weights; null: none."""
    test: Place | None = Field(default="test.jsonl", examples=["rows/test.jsonl"])
    """The file of the rows that base and adapter are evaluated on; null: none."""


class ParquetData(StreamableData):
    """Rows in Parquet files that hold their images, as Hugging Face's datasets writes them."""

    source: Literal["parquet"]
    """The name of the source."""
    root: Place = Field(examples=["data/clothing"])
    """Folder that the files are relative to."""
    train: Place = Field(default="train*.parquet", examples=["data/train-*.parquet"])
    """The files of the training rows: one file, or a pattern for several."""
    val: Place | None = Field(default="val*.parquet", examples=["data/validation-*.parquet"])
    """The files of the rows that choose the best weights; null: none."""
    test: Place | None = Field(default="test*.parquet", examples=["data/test-*.parquet"])
    """The files of the rows that base and adapter are evaluated on; null: none."""


class SavedData(ColumnData):
    """A folder that ``datasets`` saved with ``save_to_disk``."""

    source: Literal["saved"]
    """The name of the source."""
    root: Place = Field(examples=["data/clothing"])
    """The folder that was saved."""
    train: Place = Field(default="train", examples=["."])
    """The training rows: a folder below root, as in a DatasetDict; ``.`` if root is a single Dataset."""
    val: Place | None = Field(default="validation", examples=["dev"])
    """The folder of the rows that choose the best weights; null: none."""
    test: Place | None = Field(default="test", examples=["held_out"])
    """The folder of the rows that base and adapter are evaluated on; null: none."""


class HubData(StreamableData):
    """A data set of the Hugging Face hub."""

    source: Literal["hub"]
    """The name of the source."""
    name: str = Field(examples=["flaviagiammarino/vqa-rad"])
    """Id of the data set on the hub, such as flaviagiammarino/vqa-rad."""
    revision: str | None = Field(default=None, examples=["main"])
    """Branch, tag or commit of the data set."""
    config: str | None = Field(default=None, examples=["default"])
    """Name of the configuration, for a data set that has several."""
    root: Place | None = Field(default=None, examples=["data/vqa-rad"])
    """A folder with the files of the data set, if the hub cannot be reached."""
    train: str = Field(default="train", examples=["train[:90%]"])
    """The split of the training rows, or a slice such as train[:90%]."""
    val: str | None = Field(default="validation", examples=["train[90%:]"])
    """The split of the rows that choose the best weights; null: none."""
    test: str | None = Field(default="test", examples=["test[:500]"])
    """The split of the rows that base and adapter are evaluated on; null: none."""


class ProceduralData(RowsSection):
    """Synthetic rows that a program draws from a seed, for the demo and for tests."""

    source: Literal["procedural"]
    """The name of the source."""
    name: Literal["medical", "retail"]
    """The domain whose images are drawn."""
    seed: Seed = Field(default=0, examples=[7])
    """The seed that the rows are drawn from."""
    rows: dict[Split, PositiveInt] = Field(
        default={"train": 2000, "val": 200, "test": 800}, examples=[{"train": 400, "val": 40, "test": 80}]
    )
    """Number of rows of each split."""
    captions: bool = Field(default=False, exclude_if=lambda value: not value, examples=[True])
    """True for rows of an image with captions of it, in place of questions."""
    question_types: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, exclude_if=lambda it: it is None, examples=[["garment"]]
    )
    """The question types of the rows; null: all of the domain."""

    @model_validator(mode="after")
    def _captions_or_questions(self) -> Self:
        if self.captions and self.question_types:
            raise ValueError("at most one of captions and question_types may be set, got both. Remove one of them")
        return self

    @property
    def synthetic(self) -> bool:
        """True if all rows are synthetic, so that scores on them are no evidence about real images."""
        return True


class Weighted(Section):
    """One source of a mix."""

    weight: Annotated[float, Field(gt=0)] = Field(default=1, examples=[2.5])
    """Weight of the source in an epoch, relative to the weights of the others."""
    data: Annotated[SerializeAsAny[RowsSection], Choice("sources", key="source", without=("mix",))] = Field(
        examples=[{"source": "jsonl", "root": "data/clothing"}]
    )
    """The section of the source."""


class MixData(ReadSection):
    """A mix of several sources; a setting that holds for all rows is given once, here.

    Training sees every row of every source at least once an epoch, and repeats the rows of a source whose weight is
    larger than its size; validation and test see every row once.
    """

    source: Literal["mix"]
    """The name of the source."""
    sources: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?$")], Weighted], Field(min_length=1)
    ] = Field(examples=[{"clothing": {"weight": 2, "data": {"source": "jsonl", "root": "data/clothing"}}}])
    """The sources by name, each with its weight and its section."""

    @model_validator(mode="after")
    def _check_sources(self) -> "MixData":
        for name, part in self.sources.items():
            if isinstance(part.data, StreamableData) and part.data.streaming:
                raise ValueError(
                    f"sources.{name} must not be a stream: a mix repeats rows by their number. Set streaming: false"
                )
            common = sorted(part.data.model_fields_set & _COMMON)
            if common:
                raise ValueError(
                    f"sources.{name} must not set {', '.join(common)}: one value holds for the whole mix. Set "
                    f"data.{common[0]} instead"
                )
        return self

    @property
    def synthetic(self) -> bool:
        """True if all rows are synthetic, so that scores on them are no evidence about real images."""
        return all(part.data.synthetic for part in self.sources.values())

    def part(self, name: str) -> Any:
        """Return the section of one source, with the settings of the whole mix."""
        section = self.sources[name].data
        common = _COMMON & type(section).model_fields.keys()
        return section.model_copy(update={field: getattr(self, field) for field in common})


DataSection = Annotated[SerializeAsAny[RowsSection], Choice("sources", key="source")]

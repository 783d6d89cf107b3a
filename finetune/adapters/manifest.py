"""The manifest: everything that must be true before an adapter may run, in one JSON file beside its weights.

It holds no rows, no images and no local paths, so it can be published. Nothing here imports torch.
"""

import hashlib
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from finetune.adapters.manifest_schema_1 import from_schema_1
from finetune.adapters.manifest_schema_2 import from_schema_2
from finetune.adapters.strict_json import canonical_json, strict_json
from finetune.core.example import ImageOptions
from finetune.core.fields import FileName, HubId, ModulePath, NamePart, Sha256, Text, UtcTime, Word
from finetune.errors import ManifestError, plain
from finetune.metrics.names import summarized
from finetune.plugins import is_own
from finetune.recipe.chosen import Choice
from finetune.recipe.task import TaskSection
from finetune.tables import METHODS_OF_TASKS

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"  # over the manifest, where somebody signed it
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
MAX_MANIFEST_BYTES = 8 * 1024 * 1024


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BaseIdentity(_Part):
    """The identity of the base model of an adapter: the bytes of its weights and of its config.

    Two bases are the same when ``files`` and ``config`` are equal; the hub id only says where to find it.
    """

    model_type: Word
    files: dict[FileName, Sha256] = Field(min_length=1, max_length=10_000)  # weight file name -> sha256
    config: Sha256  # of the canonical JSON of config.json
    hub_id: HubId | None = None
    revision: Word | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over everything that must be equal."""
        return sha256_hex(canonical_json({"files": self.files, "config": self.config}))


class ProcessorDigests(_Part):
    """The digests of tokenizer, processor, chat template and generation config; a change of any changes the answers."""

    tokenizer: Sha256
    processor_config: Sha256
    chat_template: Sha256
    generation_config: Sha256


class TensorEntry(_Part):
    """The shape and dtype (by safetensors' names, such as ``F32``) of one saved tensor."""

    shape: list[Annotated[int, Field(ge=1, le=2**31)]] = Field(max_length=8)
    dtype: Literal["F32", "F16", "BF16"]


class PartDescription(_Part):
    """The part of an adapter that one method attached."""

    method: Word
    options: dict[Word, Any]
    # tower -> full names of what is adapted
    modules: dict[Word, Annotated[list[ModulePath], Field(max_length=20_000)]]

    @property
    def places(self) -> list[tuple[str, str]]:
        """The tower and the full name of each module or parameter that is adapted."""
        return [(tower, name) for tower, names in self.modules.items() for name in names]

    @property
    def names(self) -> list[str]:
        """The full names of the modules or parameters that are adapted."""
        return [name for _, name in self.places]


class AdapterDescription(_Part):
    """The description of an adapter: a part for each method."""

    peft_type: Word  # PEFT's own, or one that PEFT refuses
    parts: list[PartDescription] = Field(min_length=1, max_length=8)
    tensors: dict[ModulePath, TensorEntry] = Field(min_length=1, max_length=20_000)

    @field_validator("parts")
    @classmethod
    def _each_once(cls, parts: list[PartDescription]) -> list[PartDescription]:
        if len({part.method for part in parts}) != len(parts):
            raise ValueError("a method stands twice")
        names: set[str] = set()
        for name in (name for part in parts for name in part.names):
            if name in names:
                raise ValueError(f"{name} is changed twice")
            names.add(name)
        if both := sorted(name for name in names if name.rpartition(".")[0] in names):
            raise ValueError(f"{both[0]} is changed twice: by itself, and with its module")
        return parts

    @property
    def has_head(self) -> bool:
        """Whether a part of the task's own gives other values than the base."""
        return any(part.method in METHODS_OF_TASKS for part in self.parts)

    @property
    def methods(self) -> str:
        """The methods' names, joined by ``+``."""
        return "+".join(part.method for part in self.parts)


class PluginEntry(_Part):
    """A name from a plug-in, and the package that brings it."""

    group: Annotated[str, Field(pattern=r"^(tasks|methods|families)$")]
    name: Word
    package: Text | None = None  # None where a script registered the name
    version: Text | None = None


# What has a default in a recipe, and in a manifest none.
_NEEDED = {"answer_normalization", "question_template", "text_template", "max_new_tokens"}


class ForeignTask(TaskSection):
    """The settings of a task whose plug-in is not installed: kept as they are, and of no use until it is."""

    model_config = ConfigDict(extra="allow")

    architectures = frozenset()

    name: Word
    """The task."""


def _task(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        return value
    name = value.get("name")
    if isinstance(name, str) and not is_own("tasks", name):
        try:
            return Choice("tasks").config(value).model_validate(value)
        except ValueError:  # it is not installed, or another version takes other settings: ``require_usable`` tells
            return ForeignTask.model_validate(value)
    config = Choice("tasks").config(value)
    if missing := sorted(_NEEDED & config.model_fields.keys() - value.keys()):
        raise ValueError(f"{missing[0]} is missing")
    return config.model_validate(value, context=info.context)


class ImageSpec(_Part):
    """The opening of images during training; every use of the adapter opens them in the same way.

    Attributes:
        range: the values of images of more than 8 bits that became black and white; None: there were none.
        page: the page of TIFF files that was taken, from 1; None: they had one.
    """

    range: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    page: Annotated[int, Field(ge=1)] | None = None

    @field_validator("range")
    @classmethod
    def _grows(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError("must be [LOW, HIGH] with LOW below HIGH")
        return value

    @property
    def options(self) -> ImageOptions:
        """The same settings as ``ImageOptions``."""
        return ImageOptions(range=(self.range[0], self.range[1]) if self.range else None, page=self.page)


class TrainingRecord(_Part):
    """The origin of the weights."""

    recipe_digest: Sha256  # of the whole recipe as it was resolved
    recipe: dict[Word, Any] | None = None  # the recipe itself, without local paths; None where only the digest is known
    data: dict[Word, Sha256]  # split -> digest of its rows and images
    rows: dict[Word, int]  # split -> number of rows
    streamed: list[Word] = []  # splits whose digest is of their files' versions, and whose rows are those the run read
    seed: int
    steps: int
    task: Text
    domain: Text


ProbeRow = Annotated[list[float], Field(min_length=1, max_length=64)]
ProbeValues = Annotated[list[ProbeRow], Field(min_length=2, max_length=4)]


class Probe(_Part):
    """The outputs of base and adapter for a synthetic image and text, recorded when the adapter was saved.

    Both are fp32: of a generative base [4 positions][64 token ids], logits; of a dual encoder [2][64], values of the
    embeddings of image and text.
    """

    version: int
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    dtype: Literal["float32", "bfloat16", "float16"]
    quantization: Literal["4bit", "8bit"] | None = None
    base: ProbeValues
    adapter: ProbeValues


class FileEntry(_Part):
    """The digest and the size in bytes of one file of the adapter."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class AdapterManifest(_Part):
    """The whole manifest. Frozen and strict: an unknown or missing field is an error.

    Schemas 1 and 2, which earlier releases wrote, are read too, by ``from_schema_1`` and ``from_schema_2``. The digest
    of an adapter is that of its manifest's bytes, so what was parsed from an earlier schema is never written again.
    """

    schema_version: Literal[3] = 3
    namespace: NamePart
    name: NamePart
    created: UtcTime
    synthetic: bool  # trained on images drawn by a program
    base: BaseIdentity
    processor: ProcessorDigests
    adapter: AdapterDescription
    task: Annotated[SerializeAsAny[TaskSection], BeforeValidator(_task)]  # as trained; an app asks exactly so
    images: ImageSpec = ImageSpec()
    toolchain: dict[Word, Word]
    training: TrainingRecord
    metrics: dict[str, dict[str, Any]]  # "test" (the adapter) and "base" (the base alone) -> scores as JSON
    probe: Probe
    license: Text | None = None
    intended_use: Text | None = None
    parents: list[Text] = []
    plugins: list[PluginEntry] = Field(default=[], max_length=16)  # packages that are needed beside this one
    files: dict[FileName, FileEntry] = Field(min_length=1, max_length=64)

    @field_validator("files")
    @classmethod
    def _names_its_own_files_only(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        folded = {name.lower() for name in files}  # as some file systems see them
        for name in (MANIFEST_NAME, SIGNATURE_NAME):
            if name in folded:
                raise ValueError(f"{name} is no file that a manifest can list")
        if len(folded) != len(files):
            raise ValueError("two names differ only in capitals")
        for needed in (WEIGHTS_NAME, CONFIG_NAME):
            if needed not in files:
                raise ValueError(f"{needed} is missing")
        return files

    @model_validator(mode="after")
    def _names_the_package_of_its_task(self) -> "AdapterManifest":
        name = self.task.name
        if isinstance(self.task, ForeignTask) and ("tasks", name) not in {(p.group, p.name) for p in self.plugins}:
            raise ValueError(f"the task {name!r} is not one of this package, and plugins names no package that has it")
        return self

    @property
    def full_name(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    def summary(self) -> dict[str, Any]:
        """Return the part of the manifest that a registry's log keeps, so that a listing opens no blob."""
        return {
            "base": self.base.digest,
            "base_id": self.base.hub_id,
            "method": self.adapter.methods,
            "task": self.training.task,
            "domain": self.training.domain,
            "synthetic": self.synthetic,
            "metrics": summarized(self.metrics),
        }

    @field_validator("probe")
    @classmethod
    def _probe_is_rectangular(cls, probe: Probe) -> Probe:
        if len({len(row) for row in (*probe.base, *probe.adapter)}) != 1:
            raise ValueError("its rows differ in length")
        return probe

    def to_bytes(self) -> bytes:
        """Return the canonical JSON of the manifest; its SHA-256 is the adapter's digest."""
        return canonical_json(self.model_dump())

    @classmethod
    def parse(cls, raw: bytes, *, source: str = MANIFEST_NAME) -> "AdapterManifest":
        """Read a manifest from its bytes.

        Raises:
            ManifestError: it is too large, no strict JSON, or breaks the schema.
        """
        data = strict_json(raw, source=source, max_bytes=MAX_MANIFEST_BYTES)
        schema = data.get("schema_version", 3) if isinstance(data, dict) else 3
        schema = schema if type(schema) is int and schema in (1, 2) else 3  # neither true nor 1.0
        try:
            return cls.model_validate(_today(data, schema, source=source))
        except ValidationError as error:
            if (count := error.error_count()) > 1000:  # a list of them all takes a kilobyte each
                raise ManifestError(f"{source}: not a manifest of schema {schema}: {count} fields are wrong") from None
            first = error.errors(include_url=False, include_context=False, include_input=False)[:3]
            problems = "; ".join(
                f"{plain('.'.join(str(p) for p in e['loc'])) or 'top level'}: {plain(e['msg'])}" for e in first
            )
            raise ManifestError(f"{source}: not a manifest of schema {schema}: {problems}") from None


def _today(data: dict[str, Any], schema: int, *, source: str) -> dict[str, Any]:
    """Return the fields of a manifest under the names of today's schema."""
    if schema == 1:
        data = from_schema_1(data, source=source)
    return from_schema_2(data, source=source) if schema < 3 else data

"""The manifest: all facts that must hold before an adapter may run, in one JSON file beside its weights.

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
    field_validator,
    model_validator,
)

from finetune.adapters.manifest_schemas import current_fields, schema_error, schema_of
from finetune.adapters.strict_json import canonical_json, strict_json
from finetune.adapters.task_settings import ForeignTask, parse_task
from finetune.core.example import ImageOptions
from finetune.core.fields import FileName, HubId, ModulePath, NamePart, Sha256, Text, UtcTime, Word
from finetune.metrics.names import summarized
from finetune.recipe.task import TaskSection
from finetune.tables import METHODS_OF_TASKS

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"  # signature over the manifest, if it is signed
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

    Two bases are the same if ``files`` and ``config`` are equal; the hub id only names a place to find the base.
    """

    model_type: Word
    files: dict[FileName, Sha256] = Field(min_length=1, max_length=10_000)  # weight file name -> sha256
    config: Sha256  # of the canonical JSON of config.json
    hub_id: HubId | None = None
    revision: Word | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over ``files`` and ``config``."""
        return sha256_hex(canonical_json({"files": self.files, "config": self.config}))


class ProcessorDigests(_Part):
    """The digests of tokenizer, processor, chat template and generation config; answers depend on all of them."""

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
    # tower -> full names of the adapted modules or parameters
    modules: dict[Word, Annotated[list[ModulePath], Field(max_length=20_000)]]

    @property
    def places(self) -> list[tuple[str, str]]:
        """The tower and the full name of each adapted module or parameter."""
        return [(tower, name) for tower, names in self.modules.items() for name in names]

    @property
    def names(self) -> list[str]:
        """The full names of the adapted modules or parameters."""
        return [name for _, name in self.places]


class AdapterDescription(_Part):
    """The description of an adapter: a part for each method."""

    peft_type: Word  # PEFT's own, or a name that PEFT refuses
    parts: list[PartDescription] = Field(min_length=1, max_length=8)
    tensors: dict[ModulePath, TensorEntry] = Field(min_length=1, max_length=20_000)

    @field_validator("parts")
    @classmethod
    def _each_once(cls, parts: list[PartDescription]) -> list[PartDescription]:
        methods = [part.method for part in parts]
        if twice := [method for method in methods if methods.count(method) > 1]:
            raise ValueError(f"a method must be unique, but {twice[0]!r} is given twice")
        names: set[str] = set()
        for name in (name for part in parts for name in part.names):
            if name in names:
                raise ValueError(f"a module must be unique, but {name!r} is given twice")
            names.add(name)
        if both := sorted(name for name in names if name.rpartition(".")[0] in names):
            raise ValueError(f"a module must be unique, but {both[0]!r} is given twice: alone and with its module")
        return parts

    @property
    def has_head(self) -> bool:
        """True if the adapter has a head of its task, whose outputs replace those of the base."""
        return any(part.method in METHODS_OF_TASKS for part in self.parts)

    @property
    def methods(self) -> str:
        """The methods' names, joined by ``+``."""
        return "+".join(part.method for part in self.parts)


class PluginEntry(_Part):
    """A name from a plug-in, and the package that provides it."""

    group: Annotated[str, Field(pattern=r"^(tasks|methods|families)$")]
    name: Word
    package: Text | None = None  # None if a script registered the name
    version: Text | None = None


class ImageSpec(_Part):
    """The settings that opened images in training; every use of the adapter opens images with the same settings.

    Attributes:
        range: the values that become black and white in images of more than 8 bits; None if there were none.
        page: the page of TIFF files, counted from 1; None if each had one page.
    """

    range: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    page: Annotated[int, Field(ge=1)] | None = None

    @field_validator("range")
    @classmethod
    def _grows(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError(f"must be [LOW, HIGH] with LOW below HIGH, got {value}")
        return value

    @property
    def options(self) -> ImageOptions:
        """The same settings as ``ImageOptions``."""
        return ImageOptions(range=(self.range[0], self.range[1]) if self.range else None, page=self.page)


class TrainingRecord(_Part):
    """The origin of the weights."""

    recipe_digest: Sha256  # of the whole resolved recipe
    recipe: dict[Word, Any] | None = None  # the recipe itself, without local paths; None if only the digest is known
    data: dict[Word, Sha256]  # split -> digest of its rows and images
    rows: dict[Word, int]  # split -> number of rows
    streamed: list[Word] = []  # splits with a digest of file versions, and with the number of rows that the run read
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

    ``parse`` also reads schemas 1 and 2, which earlier releases wrote. The digest of an adapter is that of its
    manifest's bytes, so a manifest that was parsed from an earlier schema is never written again.
    """

    schema_version: Literal[3] = 3
    namespace: NamePart
    name: NamePart
    created: UtcTime
    synthetic: bool  # trained on images drawn by a program
    base: BaseIdentity
    processor: ProcessorDigests
    adapter: AdapterDescription
    task: Annotated[SerializeAsAny[TaskSection], BeforeValidator(parse_task)]  # as in training, and in every use
    images: ImageSpec = ImageSpec()
    toolchain: dict[Word, Word]
    training: TrainingRecord
    metrics: dict[str, dict[str, Any]]  # "test" (the adapter) and "base" (the base alone) -> scores as JSON
    probe: Probe
    license: Text | None = None
    intended_use: Text | None = None
    parents: list[Text] = []
    plugins: list[PluginEntry] = Field(default=[], max_length=16)  # packages that the adapter also needs
    files: dict[FileName, FileEntry] = Field(min_length=1, max_length=64)

    @field_validator("files")
    @classmethod
    def _names_its_own_files_only(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        folded = [name.lower() for name in files]  # some file systems ignore case
        for name in (MANIFEST_NAME, SIGNATURE_NAME):
            if name in folded:
                raise ValueError(f"must not list {name}")
        if alike := [name for name in files if folded.count(name.lower()) > 1]:
            raise ValueError(f"names must not differ only in capitals, got {' and '.join(sorted(alike)[:2])}")
        for needed in (WEIGHTS_NAME, CONFIG_NAME):
            if needed not in files:
                raise ValueError(f"must list {needed}")
        return files

    @model_validator(mode="after")
    def _names_the_package_of_its_task(self) -> "AdapterManifest":
        name = self.task.name
        if isinstance(self.task, ForeignTask) and ("tasks", name) not in {(p.group, p.name) for p in self.plugins}:
            raise ValueError(f"plugins must name the package of the task {name!r}, which finetune-vlm does not have")
        return self

    @property
    def full_name(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    def summary(self) -> dict[str, Any]:
        """Return the fields for a registry's log, so that a listing opens no blob."""
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
        if len(lengths := sorted({len(row) for row in (*probe.base, *probe.adapter)})) != 1:
            raise ValueError(f"rows must have equal lengths, got {', '.join(map(str, lengths))}")
        return probe

    def to_bytes(self) -> bytes:
        """Return the canonical JSON of the manifest; its SHA-256 is the adapter's digest."""
        return canonical_json(self.model_dump())

    @classmethod
    def parse(cls, raw: bytes, *, source: str = MANIFEST_NAME) -> "AdapterManifest":
        """Read a manifest from its bytes.

        Raises:
            ManifestError: the bytes are too large, are not strict JSON, or break the schema.
        """
        data = strict_json(raw, source=source, max_bytes=MAX_MANIFEST_BYTES)
        schema = schema_of(data)
        try:
            return cls.model_validate(current_fields(data, schema, source=source))
        except ValidationError as error:
            raise schema_error(error, schema, source=source) from None

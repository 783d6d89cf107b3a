"""The manifest: everything that must be true before an adapter may run, in one JSON file beside its weights.

It holds no rows, no pictures and no local paths, so it can be published. Nothing here imports torch.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from finetune.errors import ManifestError

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"  # over the manifest, where somebody signed it
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
MAX_MANIFEST_BYTES = 8 * 1024 * 1024

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RelativePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
NamePart = Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?$")]


def canonical_json(value: Any) -> bytes:
    """Returns the one byte string that stands for ``value``: sorted keys, no spaces, UTF-8, finite numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """Returns the SHA-256 of ``data`` in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BaseIdentity(_Part):
    """Which base model an adapter belongs to: the bytes of its weights and of its config.

    Two bases are the same when ``files`` and ``config`` are equal; the hub id only says where to find it.
    """

    model_type: str
    files: dict[str, Sha256] = Field(min_length=1)  # weight file name -> sha256
    config: Sha256  # of the canonical JSON of config.json
    hub_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")] | None = None
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over everything that must be equal."""
        return sha256_hex(canonical_json({"files": self.files, "config": self.config}))


class ProcessorDigests(_Part):
    """What turns pictures and text into tensors, and tensors into text; a change of any part changes the answers."""

    tokenizer: Sha256
    processor_config: Sha256
    chat_template: Sha256
    generation_config: Sha256


class TensorEntry(_Part):
    """Shape and dtype (safetensors' names, such as ``F32``) of one saved tensor."""

    shape: list[Annotated[int, Field(ge=1, le=2**31)]] = Field(max_length=8)
    dtype: Literal["F32", "F16", "BF16"]


class PartDescription(_Part):
    """What one method attached, where."""

    method: str
    options: dict[str, Any]
    modules: dict[str, Annotated[list[str], Field(max_length=20_000)]]  # tower -> full names of what is adapted


class AdapterDescription(_Part):
    """What was attached: a part for each method."""

    peft_type: str  # PEFT's own, or one that PEFT refuses
    parts: list[PartDescription] = Field(min_length=1, max_length=8)
    tensors: dict[str, TensorEntry] = Field(min_length=1, max_length=20_000)

    @field_validator("parts")
    @classmethod
    def _each_method_once(cls, parts: list[PartDescription]) -> list[PartDescription]:
        if len({part.method for part in parts}) != len(parts):
            raise ValueError("a method stands twice")
        return parts

    @property
    def methods(self) -> str:
        """The methods' names, joined by ``+``."""
        return "+".join(part.method for part in self.parts)


class GenerationSettings(_Part):
    """How an answer is decoded; anything else is as the base's generation config says."""

    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)]
    do_sample: Literal[False] = False
    num_beams: Literal[1] = 1


class VqaContract(_Part):
    """How the adapter was asked during training; ``.ask`` applies exactly this."""

    name: Literal["vqa"] = "vqa"
    system_prompt: str | None = None
    question_template: str
    generation: GenerationSettings
    answer_normalization: Literal["vqa"]

    @field_validator("question_template")
    @classmethod
    def _has_its_place(cls, template: str) -> str:
        if template.count("{question}") != 1:
            raise ValueError("must hold {question} exactly once")
        return template


class ContrastiveContract(_Part):
    """How labels became texts during training; ``.classify`` applies exactly this."""

    name: Literal["contrastive"] = "contrastive"
    text_template: str
    answer_normalization: Literal["vqa"]

    @field_validator("text_template")
    @classmethod
    def _has_its_place(cls, template: str) -> str:
        if template.count("{label}") != 1:
            raise ValueError("must hold {label} exactly once")
        return template


PromptContract = VqaContract | ContrastiveContract


class TrainingRecord(_Part):
    """Where the weights come from."""

    recipe: Sha256
    data: dict[str, Sha256]  # split -> digest of its rows and pictures
    rows: dict[str, int]  # split -> number of rows
    streamed: list[str] = []  # splits whose digest is of their files' versions, and whose rows are those the run read
    seed: int
    steps: int
    task: str
    domain: str


ProbeRow = Annotated[list[float], Field(min_length=1, max_length=64)]
ProbeValues = Annotated[list[ProbeRow], Field(min_length=2, max_length=4)]


class Probe(_Part):
    """What base and adapter made of a synthetic picture and text, recorded when the adapter was saved.

    Both are fp32: of a generative base [4 positions][64 token ids], logits; of a dual encoder [2][64], values of the
    embeddings of picture and text.
    """

    version: int
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    dtype: Literal["float32", "bfloat16", "float16"]
    quantization: Literal["4bit", "8bit"] | None = None
    base: ProbeValues
    adapter: ProbeValues


class FileEntry(_Part):
    """Digest and size in bytes of one file of the adapter."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class AdapterManifest(_Part):
    """The whole manifest. Frozen and strict: an unknown or missing field is an error."""

    schema_version: Literal[1] = 1
    namespace: NamePart
    name: NamePart
    created: str  # ISO 8601, UTC
    synthetic: bool  # trained on pictures drawn by a program
    base: BaseIdentity
    processor: ProcessorDigests
    adapter: AdapterDescription
    prompt: Annotated[PromptContract, Field(discriminator="name")]
    toolchain: dict[str, str]
    training: TrainingRecord
    metrics: dict[str, dict[str, Any]]  # "before" and "after" -> scores
    probe: Probe
    license: str | None = None
    intended_use: str | None = None
    parents: list[str] = []
    files: dict[RelativePath, FileEntry] = Field(min_length=1, max_length=64)

    @field_validator("files")
    @classmethod
    def _names_its_own_files_only(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in (MANIFEST_NAME, SIGNATURE_NAME):
            if name in files:
                raise ValueError(f"{name} is no file that a manifest can list")
        for needed in (WEIGHTS_NAME, CONFIG_NAME):
            if needed not in files:
                raise ValueError(f"{needed} is missing")
        return files

    @property
    def full_name(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    def summary(self) -> dict[str, Any]:
        """Returns what a registry's log keeps of the manifest, so that listing opens no blob."""
        return {
            "base": self.base.digest,
            "base_id": self.base.hub_id,
            "method": self.adapter.methods,
            "task": self.training.task,
            "domain": self.training.domain,
            "synthetic": self.synthetic,
            "metrics": {
                when: {k: v for k, v in scores.items() if isinstance(v, int | float)}
                for when, scores in self.metrics.items()
            },
        }

    @field_validator("probe")
    @classmethod
    def _probe_is_rectangular(cls, probe: Probe) -> Probe:
        if len({len(row) for row in (*probe.base, *probe.adapter)}) != 1:
            raise ValueError("its rows differ in length")
        return probe

    def to_bytes(self) -> bytes:
        """Returns the canonical JSON of the manifest; its SHA-256 is the adapter's digest."""
        return canonical_json(self.model_dump())

    @classmethod
    def parse(cls, raw: bytes, *, source: str = MANIFEST_NAME) -> "AdapterManifest":
        """Reads a manifest from its bytes.

        Raises:
            ManifestError: it is too large, no strict JSON, or breaks the schema.
        """
        data = strict_json(raw, source=source, max_bytes=MAX_MANIFEST_BYTES)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(p) for p in e['loc']) or 'top level'}: {e['msg']}" for e in error.errors()[:5]
            )
            raise ManifestError(f"{source}: not a manifest of schema 1: {problems}") from None


def strict_json(raw: bytes, *, source: str, max_bytes: int) -> Any:
    """Parses JSON that came from elsewhere: capped in size, no duplicate keys, no NaN or Infinity.

    Raises:
        ManifestError: with ``source`` and what is wrong.
    """
    if len(raw) > max_bytes:
        raise ManifestError(f"{source}: {len(raw)} bytes; at most {max_bytes} are allowed")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ManifestError(f"{source}: the key {twice!r} stands twice")
        return out

    def no_constant(name: str) -> Any:
        raise ManifestError(f"{source}: {name} is not a number that JSON allows")

    def finite(text: str) -> float:
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ManifestError(f"{source}: the number {text} is too large")
        return number

    try:
        value = json.loads(raw, object_pairs_hook=no_duplicates, parse_constant=no_constant, parse_float=finite)
        canonical_json(value)  # a lone surrogate has no UTF-8
        return value
    except (ValueError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{source}: not JSON: {error}") from None

"""The base that vLLM serves, as its files show it: its identity, and the digests of its processor."""

import json
from dataclasses import dataclass
from pathlib import Path

from finetune.adapters.base_identity import (
    identify_base,
    identify_processor,
    require_same_base,
    require_same_processor,
    snapshot_folder,
)
from finetune.adapters.manifest import AdapterManifest, BaseIdentity, ProcessorDigests


@dataclass(frozen=True, kw_only=True)
class ServedBase:
    """The base to which every served adapter must belong.

    Attributes:
        identity: the identity of the base.
        processor: the digests of its tokenizer, processor, chat template and generation config.
        max_lora_rank: the largest rank that vLLM has room for.
    """

    identity: BaseIdentity
    processor: ProcessorDigests
    max_lora_rank: int

    def require_same(self, manifest: AdapterManifest) -> None:
        """Raise BaseMismatchError, with the first difference, unless an adapter was trained on this base."""
        require_same_base(manifest.base, self.identity)
        require_same_processor(manifest.processor, self.processor)


def identify_served(model: str, *, revision: str | None, chat_template: str | None, max_lora_rank: int) -> ServedBase:
    """Return the base that vLLM serves; weights that were not seen before are hashed.

    Args:
        model: the folder or hub id, as vLLM has it.
        revision: the revision of the hub id.
        chat_template: the text of ``--chat-template``; None where the base's own is used.
        max_lora_rank: the largest rank that vLLM has room for.

    Raises:
        ModelError: the base's files are not there, or not in safetensors.
    """
    template = chat_template_of(snapshot_folder(model, revision=revision)) if chat_template is None else chat_template
    return ServedBase(
        identity=identify_base(model, revision=revision),
        processor=identify_processor(model, revision=revision, chat_template=template),
        max_lora_rank=max_lora_rank,
    )


def chat_template_of(folder: Path) -> str:
    """Return the chat template that transformers loads from ``folder``; empty where there is none."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):  # as older releases wrote it
        if (path := folder / name).is_file():
            template = json.loads(path.read_bytes()).get("chat_template")
            if isinstance(template, str):
                return template
    return ""

"""The base that vLLM serves: the digests of its files and of its processor."""

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
    """The base that every served adapter must match.

    Attributes:
        identity: the identity of the base.
        processor: the digests of its tokenizer, processor, chat template and generation config.
        max_lora_rank: the largest rank that vLLM accepts.
    """

    identity: BaseIdentity
    processor: ProcessorDigests
    max_lora_rank: int

    def require_same(self, manifest: AdapterManifest) -> None:
        """Check that an adapter was trained on this base.

        Raises:
            BaseMismatchError: the adapter was trained on another base; it names the first difference.
        """
        require_same_base(manifest.base, self.identity)
        require_same_processor(manifest.processor, self.processor)


def identify_served(model: str, *, revision: str | None, chat_template: str | None, max_lora_rank: int) -> ServedBase:
    """Return the base that vLLM serves; this hashes weights that are new on this machine.

    Args:
        model: the folder or hub id in vLLM's config.
        revision: the revision of the hub id.
        chat_template: the text of ``--chat-template``; None to use the base's own.
        max_lora_rank: the largest rank that vLLM accepts.

    Raises:
        ModelError: the files of the base are missing, or are not in safetensors.
    """
    template = chat_template_of(snapshot_folder(model, revision=revision)) if chat_template is None else chat_template
    return ServedBase(
        identity=identify_base(model, revision=revision),
        processor=identify_processor(model, revision=revision, chat_template=template),
        max_lora_rank=max_lora_rank,
    )


def chat_template_of(folder: Path) -> str:
    """Return the chat template that transformers loads from ``folder``; empty if there is none."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):  # files of older releases
        if (path := folder / name).is_file():
            template = json.loads(path.read_bytes()).get("chat_template")
            if isinstance(template, str):
                return template
    return ""

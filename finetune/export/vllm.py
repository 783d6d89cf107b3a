"""The target ``vllm``: LoRA on the language model, for ``vllm serve --lora-modules NAME=FOLDER``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from finetune.adapters.card import CARD_NAME, Card, model_card
from finetune.export.peft import Peft
from finetune.export.snippets import IMAGE_NAME, example_question, messages_code
from finetune.export.vllm_rules import DEFAULT_MAX_LORA_RANK, refuse_for_vllm

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.adapters.manifest import AdapterManifest
    from finetune.export.target import Comparison, Source
    from finetune.recipe import PromptSection

_LOADING = """\
from base64 import b64encode

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

llm = LLM("{base}"{revision}, enable_lora=True, max_lora_rank={max_lora_rank})
image = b64encode(open("{image}", "rb").read()).decode()
question = {question}
{messages}
answers = llm.chat(
    messages,
    SamplingParams(temperature=0, max_tokens={max_new_tokens}),
    lora_request=LoRARequest("{name}", 1, "FOLDER"),  # this one
)
print(answers[0].outputs[0].text.strip())"""
_IMAGE_PART = '{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}}'


@dataclass(frozen=True, kw_only=True)
class Vllm:
    """A target that writes PEFT's format within the limits of vLLM. It does not run vLLM, which needs a GPU.

    Attributes:
        max_lora_rank: the ``--max-lora-rank`` of vLLM.
    """

    max_lora_rank: int = DEFAULT_MAX_LORA_RANK

    def refuse(self, manifest: AdapterManifest) -> None:
        """Check that vLLM serves the whole adapter.

        Raises:
            ExportError: vLLM would refuse the adapter, or serve only a part of it.
        """
        refuse_for_vllm(manifest, max_lora_rank=self.max_lora_rank)

    def make(self, source: Source, folder: Path) -> list[Comparison]:
        """Write the files of the target ``peft`` with the scaling baked in, which PEFT opens, and a card for vLLM."""
        comparisons = Peft(bake_scaling=True).make(source, folder)
        identity, task = source.manifest.base, cast("PromptSection", source.manifest.task)
        loading = _LOADING.format(
            base=identity.hub_id or "BASE",
            revision=f', revision="{identity.revision}"' if identity.revision else "",
            max_lora_rank=self.max_lora_rank,
            name=source.manifest.full_name,
            image=IMAGE_NAME,
            question=repr(example_question(task)),
            messages=messages_code(task, image=_IMAGE_PART),
            max_new_tokens=task.longest_answer,
        )
        card = Card(
            version=source.version,
            digest=source.adapter.digest,
            library_name="peft",
            loading=loading,
            checks="vLLM itself did not answer when it was checked: `export.json` lists what was compared, with PEFT "
            "on the same base.",
        )
        (folder / CARD_NAME).write_text(model_card(source.manifest, card), encoding="utf-8")
        return comparisons

"""The contract between an adapter and what asks it: a recipe's task section as a manifest keeps it, and back."""

from typing import Any

from finetune.adapters.manifest import ContrastiveContract, GenerationSettings, PromptContract, VqaContract
from finetune.recipe import AnswerSection, ContrastiveSection, TaskSection, VqaSection


def contract_of(section: TaskSection, *, caption_question: str | None = None) -> PromptContract:
    """Returns what the manifest keeps of a recipe's task.

    Args:
        section: the recipe's, with what follows from its data filled in.
        caption_question: what was asked where captions were learnt.
    """
    answers: dict[str, Any] = section.model_dump(include=set(AnswerSection.model_fields) - {"metrics"})
    if isinstance(section, ContrastiveSection):
        return ContrastiveContract(text_template=section.text_template, **answers)
    return VqaContract(
        system_prompt=section.system_prompt or None,
        question_template=section.question_template,
        image_position=section.image_position or "first",
        caption_question=caption_question,
        generation=GenerationSettings(max_new_tokens=section.longest_answer),
        **answers,
    )


def section_of(contract: PromptContract) -> TaskSection:
    """Returns the task that repeats what an adapter was trained with."""
    answers: dict[str, Any] = contract.model_dump(include=set(AnswerSection.model_fields))
    if isinstance(contract, ContrastiveContract):
        return ContrastiveSection(name="contrastive", text_template=contract.text_template, **answers)
    return VqaSection(
        system_prompt=contract.system_prompt,
        question_template=contract.question_template,
        image_position=contract.image_position,
        max_new_tokens=contract.generation.max_new_tokens,
        **answers,
    )

"""The contract between an adapter and what asks it: a recipe's task section as a manifest keeps it, and back."""

from finetune.adapters.manifest import ContrastiveContract, GenerationSettings, PromptContract, VqaContract
from finetune.recipe import ContrastiveSection, TaskSection, VqaSection


def contract_of(section: TaskSection, *, caption_question: str | None = None) -> PromptContract:
    """Returns what the manifest keeps of a recipe's task.

    Args:
        section: the recipe's.
        caption_question: what was asked where captions were learnt.
    """
    if isinstance(section, ContrastiveSection):
        return ContrastiveContract(
            text_template=section.text_template, answer_normalization=section.answer_normalization
        )
    return VqaContract(
        system_prompt=section.system_prompt,
        question_template=section.question_template,
        caption_question=caption_question,
        generation=GenerationSettings(max_new_tokens=section.max_new_tokens),
        answer_normalization=section.answer_normalization,
    )


def section_of(contract: PromptContract) -> TaskSection:
    """Returns the task that repeats what an adapter was trained with."""
    if isinstance(contract, ContrastiveContract):
        return ContrastiveSection(
            name="contrastive",
            text_template=contract.text_template,
            answer_normalization=contract.answer_normalization,
        )
    return VqaSection(
        system_prompt=contract.system_prompt,
        question_template=contract.question_template,
        max_new_tokens=contract.generation.max_new_tokens,
        answer_normalization=contract.answer_normalization,
    )

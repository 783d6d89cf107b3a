"""The prompt spec of a recipe: completed from the data, and compared with the prompts of an app.

An adapter answers well if an app asks it in the form of its training. So the prompt spec of the manifest holds the
settings that come from the rows: a system message, the place of images, the length of answers. Rows without a common
setting are an error. For every shape of prompt in the data, the check passes one row through an app's own path, before
training and again from the saved manifest. Its token ids must be those of the training batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune.errors import DataError, brief
from finetune.metrics.normalization import equal_answers
from finetune.recipe import AnswerSection, PromptSection, QuestionSection
from finetune.serving.asking import conversation_row, question_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from finetune.assemble.batches import Batches
    from finetune.core.example import Example, ImagePosition, Message
    from finetune.data.survey import PromptShape, Survey
    from finetune.recipe import TaskSection

_LISTED = 5  # groups or texts named in a message
_SHOWN_IDS = 12  # tokens shown around the first difference


def complete_task(section: TaskSection, survey: Survey, *, limit: int | None = None) -> TaskSection:
    """Return a recipe's task, with the settings that it leaves open taken from the data.

    Args:
        section: the section of the task in the recipe.
        survey: the survey of the training rows.
        limit: the largest number of tokens that the base takes; None for no bound.

    Raises:
        DataError: the rows differ, so that no single prompt repeats them.
    """
    section = from_survey(section, survey)
    if not isinstance(section, QuestionSection):
        return section
    update: dict[str, Any] = {}
    if section.system_prompt is None and (system := _common_system(survey)) is not None:
        update["system_prompt"] = system
    if section.image_position is None:
        update["image_position"] = _common_position(survey)
    if section.question_template != "{question}" and survey.forms == {"conversation"}:
        shape = next(iter(survey.shapes))
        raise DataError(
            'task.question_template must be "{question}" if all rows are conversations, which train unchanged, got '
            f"{section.question_template!r}. ask() would make another prompt than {shape}. Write the template's words "
            'into the messages, or set task.question_template="{question}".'
        )
    return with_longest_answer(section.model_copy(update=update), survey, limit=limit)


def from_survey(section: TaskSection, survey: Survey) -> TaskSection:
    """Return a task with the settings that the survey of the training rows decides.

    Raises:
        DataError: the rows do not decide a setting.
    """
    question = survey.questions.most_common(1)[0][0] if survey.questions else None
    return section.from_rows(answers=survey.answers if survey.is_whole else None, question=question)


def with_longest_answer(section: TaskSection, survey: Survey, *, limit: int | None = None) -> TaskSection:
    """Return a task with room for the longest reference answer and some more, if the recipe sets no length.

    Arguments as for ``complete_task``; the survey may also be that of the rows to evaluate.
    """
    longest = survey.longest_answer
    if not isinstance(section, PromptSection) or section.max_new_tokens is not None or longest is None:
        return section
    room = max(4, longest // 4)
    if limit is not None and survey.longest_row is not None:
        room = max(0, min(room, limit - survey.longest_row))
    return section.model_copy(update={"max_new_tokens": longest + room})


def _common_system(survey: Survey) -> str | None:
    """Return the common system message of all rows; None if no row has one."""
    if len(survey.systems) > 1:
        named = ", ".join(
            f"{'none' if text is None else repr(text)[:60]} ({rows} rows)"
            for text, rows in survey.systems.most_common(_LISTED)
        )
        raise DataError(
            "all rows must have the same system message, because ask() sends one, got "
            f"{len(survey.systems)} different system messages: {named}. Set task.system_prompt to one of them, or to "
            '"" for none. Rows without a system message then train with it, other rows keep theirs, and an app sends '
            "theirs by chat()."
        )
    return next(iter(survey.systems), None)


def _common_position(survey: Survey) -> ImagePosition:
    """Return the place of images in ask(): that of all conversations, or ``first`` if rows are questions too."""
    if survey.forms == {"conversation"} and len(survey.image_positions) == 1:
        return next(iter(survey.image_positions)) or "first"
    return "first"


def report_lengths(section: TaskSection, surveys: Mapping[str, Survey], log: Callable[[str], None]) -> None:
    """Log the number of answers in each split that are longer than a generated answer may be."""
    if not isinstance(section, PromptSection):
        return
    most = section.longest_answer
    for split, survey in surveys.items():
        rows = sum(number for tokens, number in survey.answer_tokens.items() if tokens > most)
        if rows:
            log(
                f"warning: {rows} of {survey.num_rows} {split} rows have answers of more than {most} tokens, up to "
                f"{survey.longest_answer}; generated answers end at {most}. Set task.max_new_tokens to "
                f"{survey.longest_answer} or more."
            )


def check_answers(section: TaskSection, surveys: Mapping[str, Survey], log: Callable[[str], None]) -> None:
    """Log the groups of different reference answers that count as equal.

    Raises:
        DataError: a reference answer is empty after normalization, or is none of the answers that the task allows.
    """
    if not isinstance(section, AnswerSection):
        return
    answers = {answer: row for survey in surveys.values() for answer, row in survey.answers.items()}
    name = section.answer_normalization
    for answer, row in answers.items():
        if not section.normalize(answer):
            raise DataError(
                f"row {row}: an answer must not be empty after task.answer_normalization={name}, got {answer!r:.80}. "
                "Any other such answer would count as right. Set task.answer_normalization=exact."
            )
    if section.allowed_answers is not None:
        allowed = {section.normalize(answer) for answer in section.allowed_answers}
        for answer, row in answers.items():
            if section.normalize(answer) not in allowed:
                raise DataError(
                    f"row {row}: the answer must be one of {brief(section.allowed_answers, 200)}, got "
                    f"{brief(answer, 80)}. Correct the row, or add the label to task.labels."
                )
    if groups := equal_answers(answers, normalize=section.normalize):
        named = "; ".join(" = ".join(repr(answer)[:40] for answer in group[:4]) for group in groups[:_LISTED])
        more = f"; and {len(groups) - _LISTED} more groups" if len(groups) > _LISTED else ""
        log(f"answers that count as equal (task.answer_normalization: {name}): {named}{more}")


def check_prompts(
    section: TaskSection, shapes: Mapping[PromptShape, Example], *, trained: Batches, asked: Batches, when: str
) -> None:
    """Pass one row of every shape through an app's path, and compare its token ids with the training batch.

    Args:
        section: the section of the task in the manifest.
        shapes: each shape of a prompt -> a row that has it.
        trained: the batches of the run's training.
        asked: the batches of an app.
        when: the stage of the run, for errors.

    Raises:
        DataError: the token ids differ; the message gives the shape, the row and the first difference.
    """
    if not isinstance(section, QuestionSection):
        return
    for shape, example in shapes.items():
        if isinstance(section, PromptSection):
            if shape.form == "caption" and example.meta["question"] != section.caption_question:
                continue  # caption() asks the question of most rows
            # An app asks for a last turn that is not supervised, too.
            wanted = _trained_ids(trained, replace(example, unsupervised=frozenset()))
            call, row = _as_an_app(section, shape, example)
        else:
            question = str(example.meta.get("question", ""))
            wanted = trained.prompt_batch([example]).inputs["input_ids"][0].tolist()
            call, row = section.call, question_row(section, list(example.images), question, urls=None)
        row = replace(row, image_options=example.image_options)  # an app has them from the manifest
        found = asked.prompt_batch([row]).inputs["input_ids"][0].tolist()
        if found != wanted:
            raise DataError(
                f"{when}: {call} must repeat the prompt that row {example.id} trains with, and those of the same "
                f"shape, {shape}, but it does not. {_difference(asked, wanted, found)}"
            )


def _trained_ids(batches: Batches, example: Example) -> list[int]:
    """Return the ids of a training row before its last supervised answer."""
    batch = batches.training_batch([(example, True)])
    assert batch.labels is not None
    supervised = (batch.labels[0] != -100).tolist()
    end = len(supervised) - supervised[::-1].index(True)
    start = end
    while start and supervised[start - 1]:
        start -= 1
    ids: list[int] = batch.inputs["input_ids"][0][:start].tolist()
    return ids


def _as_an_app(section: PromptSection, shape: PromptShape, example: Example) -> tuple[str, Example]:
    """Return the call with which an app asks the row's question, and the row that this call makes."""
    has_own_system = shape.system != (section.system_prompt or None)  # ask() sends only the one of the prompt spec
    if shape.form == "conversation" or has_own_system:
        messages = _with_images(example.prompt, example.images)
        return "chat(messages)", conversation_row(section, messages, urls=None)
    call = "caption(image)" if shape.form == "caption" else "ask(image, question)"
    return call, question_row(section, list(example.images), example.meta["question"], urls=None)


def _with_images(messages: Iterable[Message], images: Iterable[Any]) -> list[Message]:
    left = iter(images)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(left)} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in messages
    ]


def _difference(batches: Batches, wanted: list[int], found: list[int]) -> str:
    decode = batches.collator.processor.tokenizer.decode
    shared = min(len(wanted), len(found))
    first = next((i for i in range(shared) if wanted[i] != found[i]), shared)
    one, other = (decode(ids[first : first + _SHOWN_IDS]) for ids in (wanted, found))
    return f"From token {first + 1} of {len(wanted)} on, training has {one!r}, and the app {other!r}."

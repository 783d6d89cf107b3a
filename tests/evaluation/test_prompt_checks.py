"""What rows bring beside the recipe reaches the prompt spec, and an app's prompts are the training prompts."""

import json

import numpy as np
import pytest

from finetune.assemble.batches import Batches
from finetune.assemble.loading import load_base
from finetune.core.example import Example, as_images
from finetune.data.survey import Survey
from finetune.errors import DataError
from finetune.evaluation.prompt_checks import (
    check_answers,
    check_prompts,
    complete_task,
    report_lengths,
    with_longest_answer,
)
from finetune.tasks.vqa import VqaConfig

IMAGE = np.zeros((32, 40, 3), np.uint8)
TEXT = {"type": "text", "text": "What color is it?"}
PART = {"type": "image"}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def conversation(*contents, system=None, answer="red", **more):
    """A row whose user messages have these contents, each answered."""
    turns = [
        message for content in contents for message in ({"role": "user", "content": list(content)}, assistant(answer))
    ]
    first = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    images = [IMAGE for content in contents for part in content if part is PART]
    meta = {"question": "What color is it?", "conversation": True}
    return Example(id="c", messages=first + turns, media=as_images(images), answers=[answer], meta=meta, **more)


def question(section, answer="red", images=1, **more):
    messages = [*section.ask("What color is it?", num_images=images), assistant(answer)]
    meta = {"question": "What color is it?"}
    return Example(id="q", messages=messages, media=as_images([IMAGE] * images), answers=[answer], meta=meta, **more)


def completed(rows, limit=None, **options):
    return complete_task(VqaConfig(**options), Survey.of(rows), limit=limit)


def test_a_system_message_of_all_rows_is_asked_again():
    rows = [conversation([PART, TEXT], system="Be brief.")] * 2
    assert completed(rows).system_prompt == "Be brief."
    assert completed(rows).as_trained().system_prompt == "Be brief."
    assert completed(rows, system_prompt="").system_prompt == ""
    assert completed(rows, system_prompt="").as_trained().system_prompt is None
    assert completed([conversation([PART, TEXT])]).system_prompt is None


def test_rows_with_different_system_messages_need_the_word_of_the_recipe():
    rows = [conversation([PART, TEXT], system="Be brief."), conversation([PART, TEXT])]
    with pytest.raises(DataError, match=r"2 different system messages: 'Be brief.' \(1 rows\), none \(1 rows\)"):
        completed(rows)
    assert completed(rows, system_prompt="Be kind.").system_prompt == "Be kind."


def test_the_place_of_images_follows_the_conversations():
    last, first, among = [TEXT, PART], [PART, TEXT], [TEXT, PART, TEXT]
    assert completed([conversation(last), conversation(last)]).image_position == "last"
    assert completed([conversation(first)]).image_position == "first"
    assert completed([conversation(last), conversation(first)]).image_position == "first"
    assert completed([conversation(among)]).image_position == "first"
    assert completed([conversation(last), question(VqaConfig())]).image_position == "first"
    assert completed([conversation(first)], image_position="last").image_position == "last"


def test_a_template_that_no_row_is_put_in_is_refused():
    template = {"question_template": "Q: {question}"}
    with pytest.raises(DataError, match="if all rows are conversations, which train unchanged, got 'Q: {question}'"):
        completed([conversation([PART, TEXT])], **template)
    completed([conversation([PART, TEXT]), question(VqaConfig(**template))], **template)


@pytest.mark.parametrize(("limit", "expected"), [(None, 50), (112, 50), (105, 45), (100, 40), (90, 40)])
def test_the_longest_answer_follows_the_data(limit, expected):
    rows = [question(VqaConfig(), num_tokens=100, num_answer_tokens=length) for length in (3, 40)]
    assert completed(rows, limit=limit).max_new_tokens == expected
    assert completed(rows, max_new_tokens=7).max_new_tokens == 7
    assert with_longest_answer(VqaConfig(), Survey.of(rows[:1])).max_new_tokens == 7
    assert completed([question(VqaConfig())]).longest_answer == 128


def test_answers_longer_than_the_limit_are_counted():
    rows = [question(VqaConfig(), num_answer_tokens=length) for length in (3, 40, 12)]
    lines = []
    report_lengths(VqaConfig(max_new_tokens=10), {"train": Survey.of(rows), "val": Survey.of(rows[:1])}, lines.append)
    (line,) = lines
    assert "2 of 3 train rows have answers of more than 10 tokens, up to 40" in line
    assert "task.max_new_tokens to 40" in line


def test_answers_that_become_equal_are_logged_and_those_that_become_nothing_refused():
    surveys = {"train": Survey.of([question(VqaConfig(), answer) for answer in ("Yes", "yes", "1,5", "15")])}
    lines = []
    check_answers(VqaConfig(answer_normalization="vqa"), surveys, lines.append)
    assert lines == [
        "answers that count as equal (task.answer_normalization: vqa): 'Yes' = 'yes'; '1,5' = '15'",
    ]
    check_answers(VqaConfig(), {"train": Survey.of([question(VqaConfig(), "+")])}, lines.append)
    with pytest.raises(DataError, match=r"row q: an answer must not be empty after .*vqa, got '\+'\. .* Set .*exact"):
        check_answers(VqaConfig(answer_normalization="vqa"), {"test": Survey.of([question(VqaConfig(), "+")])}, print)


SHAPES = {
    "conversation": conversation([PART, TEXT]),
    "image last": conversation([TEXT, PART]),
    "image among text": conversation([TEXT, PART, TEXT]),
    "several images": conversation([PART, PART, TEXT]),
    "no image": conversation([TEXT]),
    "several turns": conversation([PART, TEXT], [TEXT], [PART, TEXT]),
    "system message": conversation([PART, TEXT], system="Be brief."),
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_shape_is_repeated_by_an_app(tiny_family, row):
    base = load_base(str(tiny_family), device="cpu")
    batches = Batches(base.collator, None)
    try:
        base.collator.supervise(row)
    except DataError:  # a template that changes earlier turns when more follow
        base.collator.supervised_turns = "last"
    section = completed([row])
    check_prompts(section.as_trained(), Survey.of([row]).shapes, trained=batches, asked=batches, when="here")


def test_questions_are_repeated_with_all_that_the_spec_holds(tiny_base):
    base = load_base(str(tiny_base), device="cpu")
    batches = Batches(base.collator, None)
    section = VqaConfig(system_prompt="Look.", question_template="Q: {question} A:", image_position="last")
    for images in (0, 1, 2):
        shapes = Survey.of([question(section, images=images)]).shapes
        check_prompts(section.as_trained(), shapes, trained=batches, asked=batches, when="here")


@pytest.mark.parametrize(
    "other", [{"question_template": "Q: {question}"}, {"system_prompt": "Look."}, {"image_position": "last"}]
)
def test_a_prompt_that_is_not_repeated_is_an_error(tiny_fast_vlm, other):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    batches = Batches(base.collator, None)
    shapes = Survey.of([question(VqaConfig())]).shapes
    wanted = (
        r"after saving: (ask|chat)\(.*\) must repeat the prompt that row q .* question \(user: image, text\), "
        "but it does not"
    )
    with pytest.raises(DataError, match=wanted):
        check_prompts(VqaConfig(**other).as_trained(), shapes, trained=batches, asked=batches, when="after saving")


@pytest.mark.parametrize("method", [None, [{"name": "prompt_tuning", "num_virtual_tokens": 3}]])
def test_a_run_on_conversations_is_asked_as_it_was_trained(tiny_fast_vlm, rows_folder, make_recipe, method, capsys):
    import finetune
    from finetune.runs.train import train
    from finetune.serving.asking import question_row

    for split in ("train", "val", "test"):
        path = rows_folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            user = {"role": "user", "content": [TEXT, {"type": "image", "image": row.pop("image")}]}
            row["messages"] = [{"role": "system", "content": "Be brief."}, user, assistant(row.pop("answer"))]
            del row["question"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {} if method is None else {"method": method}
    recipe = make_recipe(tiny_fast_vlm, task={"name": "vqa"}, **changes)
    result = train(recipe)
    filled_in = "task, from the rows: system_prompt='Be brief.', image_position='last', max_new_tokens=17"
    assert filled_in in capsys.readouterr().out
    vlm = finetune.load(str(result.ref), base=str(tiny_fast_vlm))
    task = vlm.adapter.manifest.task
    assert (task.system_prompt, task.image_position) == ("Be brief.", "last")
    assert task.max_new_tokens == 13 + 4  # "it is red, I think" with its end, and some room
    row = question_row(vlm.task.options, IMAGE, "What color is it?", urls=None)
    text = vlm.processor.tokenizer.decode(vlm.prompt_batch([row]).inputs["input_ids"][0])
    assert text.index("Be brief.") < text.index("What color is it?")
    assert [part["type"] for part in row.prompt[-1]["content"]] == ["text", "image"]

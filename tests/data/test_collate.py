"""From rows to tensors: exactly the assistant's turns are supervised, whatever the padding, turns and images."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from finetune.assemble.loading import load_base
from finetune.assemble.rows import examples_of
from finetune.core.example import Example, answer, as_images, ask, system
from finetune.data.collate import KEPT_TOKENS
from finetune.data.kept_rows import KeptRows
from finetune.data.spans import Tokenized, place_spans
from finetune.errors import DataError, RowError
from finetune.recipe import JsonlData
from finetune.serving.vision_language_model import VisionLanguageModel

IMAGE = {"type": "image"}


@pytest.fixture(scope="session")
def loaded(tiny_base):
    return {which: load_base(str(tiny_base), device="cpu", data=section(which)) for which in ("all", "last")}


def section(supervise):
    return JsonlData(source="jsonl", root="", supervise=supervise)


@pytest.fixture
def base(loaded, monkeypatch):
    base = loaded["all"]
    monkeypatch.setattr(base.collator, "end_ids", base.collator.end_ids)
    monkeypatch.setattr(base.processor, "chat_template", base.processor.chat_template)
    for kept in ("_rows", "_prompts"):  # what was rendered by another template
        monkeypatch.setattr(base.collator, kept, KeptRows(KEPT_TOKENS))
    return base


def image(value=90, size=(20, 30)):
    return np.zeros((*size, 3), np.uint8) + np.uint8(value)


def example(text="blue", question="What color is it?"):
    return Example(id="x", messages=[*ask(question), answer(text)], media=as_images([image()]), answers=[text])


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


TURNS = [
    system("Be brief, say one word."),
    user(IMAGE, text("What color is it?")),
    answer("red"),
    user(text("Is it a circle?")),
    answer("yes, it is"),
    user(text("And how many are in"), IMAGE, text("this one?")),
    answer("two"),
]
SUPERVISED = [" red<|end|>", " yes, it is<|end|>", " two<|end|>"]


def conversation():
    """Three turns about two images of different sizes."""
    return Example(id="talk", messages=TURNS, media=as_images([image(), image(200, (64, 20))]), answers=["two"])


def text_only():
    messages = [system("Be brief."), user(text("How many?")), answer("one"), user(text("Is it?")), answer("no")]
    return Example(id="text", messages=messages, media=(), answers=["no"])


def runs(labels):
    """Return the supervised ids of a row, a list for each stretch."""
    out, before = [], -100
    for label in labels.tolist():
        if label != -100:
            out.append([label]) if before == -100 else out[-1].append(label)
        before = label
    return out


def ids(base, words):
    return base.processor.tokenizer(words, add_special_tokens=False)["input_ids"]


def test_exactly_the_answer_and_its_end_are_supervised(base):
    rows = [example("blue"), example("it is a rather long answer, 12 words?"), example("é", "Is it?")]
    batch = base.collator.training_batch(rows)
    for i, row in enumerate(rows):
        assert runs(batch.labels[i]) == [ids(base, f" {row.answers[0]}<|end|>")]
        where = (batch.labels[i] != -100).nonzero().flatten()
        assert torch.equal(batch.inputs["input_ids"][i][where], batch.labels[i][where])


@pytest.mark.parametrize(("supervise", "expected"), [("all", SUPERVISED), ("last", SUPERVISED[-1:])])
def test_three_turns_about_two_images(loaded, supervise, expected):
    base = loaded[supervise]
    rows = [example(), conversation(), text_only()]
    batch = base.collator.training_batch(rows)
    assert runs(batch.labels[1]) == [ids(base, words) for words in expected]
    assert runs(batch.labels[2]) == [
        ids(base, w) for w in ([" one<|end|>", " no<|end|>"] if supervise == "all" else [" no<|end|>"])
    ]
    row = batch.inputs["input_ids"][1]
    supervised = batch.labels[1] != -100
    for stretch, turn in zip(runs(batch.labels[1]), [2, 4, 6][-len(expected) :], strict=True):
        first = next(i for i in range(len(row)) if supervised[i] and row[i : i + len(stretch)].tolist() == stretch)
        before = replace(
            conversation(), messages=TURNS[: turn + 1], media=as_images(conversation().images[: 1 + (turn == 6)])
        )
        prompt = base.collator.prompt_batch([before]).inputs["input_ids"][0]
        assert torch.equal(row[:first], prompt), "what stands before a turn is what generation would be given"
        supervised[first : first + len(stretch)] = False


@pytest.mark.parametrize(
    "rows", [[text_only()], [text_only(), conversation()], [conversation(), text_only(), example()]]
)
def test_rows_with_and_without_images_run_in_one_batch(base, rows):
    """And each row's logits are those it has alone: no image reaches a row that is not its own."""
    batch = base.collator.training_batch(rows)
    with torch.inference_mode():
        batched = base.model(**batch.inputs).logits
        for i, row in enumerate(rows):
            alone = base.collator.training_batch([row])
            length = alone.inputs["input_ids"].shape[1]
            assert torch.equal(alone.labels[0], batch.labels[i][:length])
            logits = base.model(**alone.inputs).logits[0]
            assert torch.allclose(batched[i, :length], logits, atol=1e-4)
    answers = base.task(make_task()).predict(base.model, base.collator.prompt_batch(rows))
    assert len(answers) == len(rows)


def make_task():
    from finetune.tasks.vqa import VqaConfig

    return VqaConfig(max_new_tokens=2)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (500, 3)])
def test_odd_shapes_reach_the_model(base, size):
    row = replace(example(), media=as_images([image(9, size)]))
    assert len(runs(base.collator.training_batch([row]).labels[0])) == 1


def test_a_filler_row_is_not_supervised(base):
    batch = base.collator.training_batch([(conversation(), False), (example(), True)])
    assert (batch.labels[0] == -100).all() and (batch.labels[1] != -100).any()


def test_prompts_are_padded_on_the_left_and_end_where_the_answer_begins(base):
    short, long = example(question="Is it?"), example(question="What color is it, and how many are there?")
    batch = base.collator.prompt_batch([short, long])
    mask = batch.inputs["attention_mask"]
    assert mask[0, 0] == 0 and mask[:, -1].all()
    training = base.collator.training_batch([short])
    start = int((training.labels[0] != -100).nonzero()[0])
    prompt = batch.inputs["input_ids"][0][mask[0] == 1]
    assert torch.equal(prompt, training.inputs["input_ids"][0, :start])


def test_every_supervised_stretch_is_shown(base):
    assert base.collator.show(example()).startswith("<|user|><")
    assert "⟦ blue<|end|>⟧" in base.collator.show(example())
    shown = base.collator.show(conversation())
    assert [part.split("⟧")[0] for part in shown.split("⟦")[1:]] == SUPERVISED


def test_chat_in_an_app_is_prompted_as_in_training(base, monkeypatch):
    vlm = VisionLanguageModel(base)
    prompts = []
    collate = base.collator.prompt_batch
    monkeypatch.setattr(base.collator, "prompt_batch", lambda rows: prompts.append(collate(rows)) or prompts[-1])
    images = iter(conversation().images)
    messages = [
        {**m, "content": [{**p, "image": next(images)} if p["type"] == "image" else p for p in m["content"]]}
        for m in TURNS[:-1]
    ]
    assert isinstance(vlm.chat(messages), str)
    training = base.collator.training_batch([conversation()])
    last = [i for i in range(len(training.labels[0])) if training.labels[0][i] != -100]
    start = max(i for i in last if i - 1 not in last)
    assert torch.equal(prompts[0].inputs["input_ids"][0], training.inputs["input_ids"][0, :start])
    assert torch.equal(prompts[0].inputs["pixel_values"], training.inputs["pixel_values"])
    vlm.ask(None, "How many?")
    vlm.ask([image(), image()], "How many?")
    counts = [int((p.inputs["input_ids"] == base.collator.image_id).sum()) for p in prompts]
    assert counts[1] == 0 and counts[2] == counts[0]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user(text("a")), answer("b")], "the last message must have role user, got assistant"),
        ([user(IMAGE, text("a"))], 'lacks its image: put it under "image"'),
        ([], "must be a non-empty list of messages, got"),
        ([user({"type": "image", "image": 3}, text("a"))], "an image must be a path, bytes"),
    ],
)
def test_a_chat_that_is_none(base, messages, message):
    with pytest.raises(DataError, match=message):
        VisionLanguageModel(base).chat(messages)


def test_a_template_without_an_end_is_refused(base):
    base.collator.end_ids = frozenset({999_999})
    with pytest.raises(DataError, match="row x: the chat template must end turn 2 with a token that ends generation"):
        base.collator.training_batch([example()])


# What LLaVA 1.5's template makes of a row: turns by name, nothing after an answer but a space.
VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_a_template_that_leaves_the_last_turn_open_is_ended(base, monkeypatch):
    base.processor.chat_template = VICUNA
    batch = base.collator.training_batch([example("blue"), example("it is red")])
    assert [runs(labels) for labels in batch.labels] == [
        [ids(base, " blue<|end|>")],
        [ids(base, " it is red<|end|>")],
    ]
    prompt = base.collator.prompt_batch([example()]).inputs["input_ids"][0].tolist()
    assert batch.inputs["input_ids"][0].tolist()[: len(prompt)] == prompt
    with pytest.raises(DataError, match="must end turn 3 with a token that ends generation"):
        base.collator.training_batch([text_only()])
    monkeypatch.setattr(base.collator, "supervised_turns", "last")
    assert runs(base.collator.training_batch([text_only()]).labels[0]) == [ids(base, " no<|end|>")]


def test_a_first_token_that_the_template_leaves_to_the_tokenizer_is_there_once(base, monkeypatch):
    monkeypatch.setattr(base.collator, "_bos", "<|user|>")  # any token of its own
    once = base.collator.render(example().prompt, for_answer=True)
    assert once.startswith("<|user|>") and not once.startswith("<|user|><|user|>")
    base.processor.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    assert base.collator.render(example().prompt) == "<|user|>What color is it?"


def test_a_template_that_does_not_end_every_turn_is_refused(base):
    """The end of a later turn is not taken for the missing one."""
    base.processor.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% for p in m['content'] %}{{ p['text'] }}"
        "{% if m['role'] == 'assistant' and p['text'] == 'no' %}<|end|>{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match="must end turn 3 with a token that ends generation"):
        base.collator.training_batch([text_only()])


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_only_the_last_is_supervised(base, monkeypatch):
    """As templates do that leave out what earlier turns thought."""
    base.processor.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% for p in m['content'] %}"
        "{% if m['role'] == 'assistant' and not loop.last %}x{% endif %}"
        "{% if m['role'] != 'assistant' or m == messages[-1] %}{{ p['text'] }}{% endif %}{% endfor %}<|end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match="must render the text before turn 3 the same with .*data.supervise=last"):
        base.collator.training_batch([text_only()])
    monkeypatch.setattr(base.collator, "supervised_turns", "last")
    assert runs(base.collator.training_batch([text_only()]).labels[0]) == [ids(base, "no<|end|>")]


def test_an_answer_that_merges_with_its_prompt_is_refused(base):
    base.processor.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {% for p in m['content'] %}"
        "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    assert runs(base.collator.training_batch([example("12")]).labels[0]) == [ids(base, "12<|end|>")]
    with pytest.raises(RowError, match="row x: turn 2 must begin with a token of its own.*Remove a space"):
        base.collator.training_batch([example("green")])


def test_a_template_that_refuses_a_row_names_it(base):
    base.processor.chat_template = "{{ raise_exception('no system prompt, please') }}"
    with pytest.raises(RowError, match="row x: the chat template cannot render .*no system prompt, please"):
        base.collator.training_batch([example()])


@pytest.mark.parametrize("marker", ["<|end|>", "<image>"])
@pytest.mark.parametrize("place", ["question", "text"])
def test_a_text_that_holds_a_token_of_the_model_is_refused(base, marker, place):
    with pytest.raises(RowError, match=f"row x, message . .[a-z]*.: the text holds .*{marker.strip('<|>')}"):
        base.collator.training_batch([example(**{place: f"a {marker} b"})])


def test_as_many_images_as_places(base):
    with pytest.raises(
        DataError,
        match="row x: the rendered text must have one placeholder for each image, got 1 placeholders for 2 images",
    ):
        base.collator.training_batch([replace(example(), media=as_images([image()] * 2))])
    with pytest.raises(
        DataError,
        match="row x: the rendered text must have one placeholder for each image, got 1 placeholders for 0 images",
    ):
        base.collator.prompt_batch([replace(example(), media=())])


def test_a_tokenizer_without_offsets_is_refused(base, monkeypatch):
    monkeypatch.setattr(type(base.processor.tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="row x: the tokenizer must return offsets, .* returns none"):
        base.collator.training_batch([example()])


def place(text, supervised, encoded):
    return place_spans(Tokenized("", text, supervised), encoded, image_id=9, row="row x")


def test_spans_are_found_behind_images():
    """9 stands for an image, and for each token of one; 7 and 8 are what a processor puts around it."""
    text = [1, 9, 2, 3, 4, 6, 9, 5, 2, 3, 4]
    made = [1, 7, 9, 9, 8, 2, 3, 4, 6, 7, 9, 9, 9, 8, 5, 2, 3, 4]
    assert place(text, [(3, 5), (9, 11)], made) == [(6, 8), (16, 18)]
    assert place([1, 2, 3], [(1, 3)], [1, 2, 3]) == [(1, 3)]
    assert place([9, 9, 5, 1, 2], [(3, 5)], [9, 9, 9, 9, 5, 1, 2]) == [(5, 7)], "images side by side"
    merged = [1, 6, 9, 9, 77, 3, 4]  # a line break behind the image and the token beside it became one
    assert place([1, 6, 9, 2, 3, 4], [(4, 6)], merged) == [(5, 7)]
    assert place([1, 9, 2, 3], [(3, 4)], [0, 1, 9, 9, 2, 3, 0]) == [(5, 6)], "tokens added at either end"
    # tiles of one image, with a line break between them that is also a text between two images
    assert place([1, 9, 4, 4, 4, 9, 2, 3, 5], [(7, 9)], [1, 9, 4, 9, 4, 4, 4, 9, 4, 9, 2, 3, 5]) == [(11, 13)]


@pytest.mark.parametrize(
    ("text", "supervised", "encoded", "message"),
    [
        ([1, 9, 2, 3], [(3, 4)], [1, 9, 9, 2, 4], "the processor must encode the text as its tokenizer does"),
        ([1, 9, 2, 3], [(3, 4)], [1, 9, 9, 2], "the processor must encode the text"),
        ([1, 2, 6, 9, 3, 4], [(5, 6)], [1, 6, 9, 9, 3, 4], "the processor must encode the text"),
        ([1, 9, 2, 3], [(3, 4)], [1, 9, 9, 2, 3, 2, 3], "must fit exactly one place"),
        ([1, 9, 2, 3], [(2, 4)], [1, 9, 9, 2, 3], "must fit exactly one place"),
    ],
)
def test_what_cannot_be_placed_is_refused(text, supervised, encoded, message):
    with pytest.raises(DataError, match=f"row x: .*{message}"):
        place(text, supervised, encoded)


def test_rows_of_a_recipe(base, make_recipe, tiny_base):
    recipe = make_recipe(tiny_base, task={"question_template": "Look: {question}", "system_prompt": "Be brief."})
    row = examples_of(recipe, "train")[0]
    text = base.collator.render(row.messages)
    assert text.startswith("<|system|>Be brief.<|end|><|user|><image>Look: What color is it?<|end|><|assistant|> ")


def test_a_row_is_rendered_once_and_what_is_kept_is_bounded(base, monkeypatch):
    collator, rows, rendered = base.collator, [example("red"), example("blue")], []
    render = collator.render
    monkeypatch.setattr(collator, "render", lambda *args, **kw: rendered.append(1) or render(*args, **kw))
    first = collator.supervise(rows[0])
    count = len(rendered)
    assert count and collator.supervise(replace(rows[0], id="another")) == first and len(rendered) == count
    with pytest.raises(DataError, match="row third: .* got 1 placeholders for 2 images"):
        collator.supervise(replace(rows[0], id="third", media=as_images(rows[0].images * 2)))
    monkeypatch.setattr(collator._rows, "room", 3)
    count = len(rendered)
    assert collator.supervise(rows[1]) == collator.supervise(rows[1]) != first
    assert len(rendered) - count > 2 and len(collator._rows.rows) == 1


def test_a_prompt_is_rendered_once_but_not_for_the_clients_of_a_server(base, monkeypatch):
    collator, rendered = base.collator, []
    render = collator.render
    monkeypatch.setattr(collator, "render", lambda *args, **kw: rendered.append(1) or render(*args, **kw))
    row, other = example("red"), replace(example("red"), id="grey", media=as_images([image(40)]))
    first = collator.prompt(row)
    count = len(rendered)
    assert count and collator.prompt(other) is first and len(rendered) == count
    with pytest.raises(DataError, match="row r, message 2 .*<image>"):
        collator.prompt(replace(row, id="r", messages=[*row.messages[:-1], answer("<image>")]))
    copied = collator.copy()
    assert copied.prompt(row) == copied.prompt(row) == first and not copied._prompts.rows

"""From rows to tensors: only the answer is learnt, whatever the padding and the picture."""

import pytest
import torch

from finetune.build import examples_of, load_base
from finetune.errors import DataError
from finetune.example import Example, answer, ask


@pytest.fixture
def base(tiny_base):
    return load_base(str(tiny_base), device="cpu")


def example(text="blue", question="What color is it?"):
    import numpy as np

    picture = np.zeros((20, 30, 3), np.uint8) + 90
    return Example(id="x", messages=[*ask(question), answer(text)], images=[picture], answers=[text])


def test_exactly_the_answer_and_its_end_are_learnt(base):
    rows = [example("blue"), example("it is a rather long answer, 12 words?"), example("é", "Is it?")]
    batch = base.collator.training_batch(rows)
    for i, row in enumerate(rows):
        learnt = batch.labels[i][batch.labels[i] != -100]
        assert base.processor.tokenizer.decode(learnt) == f" {row.answers[0]}<|end|>"
        where = (batch.labels[i] != -100).nonzero().flatten()
        assert torch.equal(batch.inputs["input_ids"][i][where], learnt)


def test_a_filler_row_learns_nothing(base):
    batch = base.collator.training_batch([(example(), False), (example(), True)])
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


def test_what_is_learnt_is_shown(base):
    assert base.collator.show(example()).startswith("<|user|><")
    assert "⟦ blue<|end|>⟧" in base.collator.show(example())


def test_a_template_without_an_end_is_refused(base):
    base.collator.end_ids = frozenset({999_999})
    with pytest.raises(DataError, match="row x: the chat template ends the answer with no token"):
        base.collator.training_batch([example()])


def test_a_template_that_rewrites_the_prompt_is_refused(base):
    base.processor.chat_template = (
        "{% if messages|length > 1 %}many{% else %}one{% endif %}<image>{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(DataError, match="renders the prompt differently"):
        base.collator.training_batch([example()])


def test_rows_of_a_recipe(base, make_recipe, tiny_base):
    recipe = make_recipe(tiny_base, task={"question_template": "Look: {question}", "system_prompt": "Be brief."})
    row = examples_of(recipe, "train")[0]
    text = base.collator.render(row.messages)
    assert text.startswith("<|system|>Be brief.<|end|><|user|><image>Look: What color is it?<|end|><|assistant|> ")

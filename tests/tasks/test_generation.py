"""Rows of one batch end where each would alone, and what is told of them on the way is what they say in the end."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.assemble.loading import load_base
from finetune.tasks.generation import GrowingText
from finetune.tasks.vqa import VqaConfig
from tests.matrix import rows
from tests.tiny.parts import tokenizer as byte_level

TEXTS = ["Is it red?", "  It is  red .\nYes , it 's \n", "größer 中文字 🦀🦀 \u200d ❤️", "नमस्ते ", "", " ", "�", "a � b"]


def byte_fallback():
    """As SentencePiece's: a space belongs to the word after it, and unknown characters are tokens of their bytes."""
    symbols = ["<pad>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Isitred?.", "▁It", "中"]
    words = {symbol: number for number, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = Tokenizer(models.BPE(words, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def word_piece():
    """As BERT's: pieces of words, whose spaces are mended when they are decoded."""
    symbols = ["[PAD]", "[UNK]", *"Isitred?.,'", *(f"##{letter}" for letter in "Isitred"), "It", "is", "n't"]
    words = {symbol: number for number, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", clean_up_tokenization_spaces=True)


def mending():
    """A byte-level one that was told to mend spaces all the same."""
    tokenizer = byte_level()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "byte fallback": byte_fallback, "word piece": word_piece, "mending": mending}


def streamed(tokenizer, ids):
    """Return the pieces that come out, and the whole text."""
    text, pieces = GrowingText(tokenizer), []
    for token in ids:
        text.ids.append(token)
        pieces.append(text.grown())
    return [*pieces, text.rest()], tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_the_text(kind):
    tokenizer, draw = TOKENIZERS[kind](), random.Random(0)
    sequences = [tokenizer(text)["input_ids"] for text in TEXTS]
    sequences += [draw.choices(range(len(tokenizer)), k=draw.randrange(1, 12)) for _ in range(1000)]
    for ids in sequences:
        pieces, whole = streamed(tokenizer, ids)
        assert "".join(pieces) == whole, ids


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_text_grows_with_its_tokens(kind):
    tokenizer = TOKENIZERS[kind]()
    pieces, whole = streamed(tokenizer, tokenizer("It is red. Is it red?")["input_ids"])
    assert whole == "It is red. Is it red?" and pieces[-1] == ""
    assert max(len(piece) for piece in pieces) <= 5  # a word and its space


@pytest.fixture(scope="module")
def base(tiny_fast_vlm):
    return load_base(str(tiny_fast_vlm), device="cpu")


LIMITS = [3, 9, 1, 6]


def answers(base, examples, **options):
    task = base.task(VqaConfig(max_new_tokens=9))
    return task.answer(base.model, base.collator.prompt_batch(examples), **options)


def test_each_row_ends_at_its_own_limit(base):
    batched = answers(base, rows(4), max_new_tokens=LIMITS)
    for row, (example, limit) in enumerate(zip(rows(4), LIMITS, strict=True)):
        assert answers(base, [example], max_new_tokens=[limit]) == [batched[row]]
        assert batched[row].completion_tokens == limit and batched[row].finish_reason == "length"
        assert batched[row].prompt_tokens == len(base.collator.prompt(example).ids)
    assert answers(base, rows(4))[1] == batched[1]


def test_all_rows_have_the_tasks_limit_where_none_is_given(base):
    assert [answer.completion_tokens for answer in answers(base, rows(2))] == [9, 9]


def test_an_answer_that_the_model_ends_is_stopped(base, monkeypatch):
    (whole,) = answers(base, rows(1))
    ids = base.model.generate(**base.collator.prompt_batch(rows(1)).inputs, max_new_tokens=9, do_sample=False)
    end = int(ids[0, -5])  # the fifth of nine
    first = ids[0, -9:].tolist().index(end) + 1
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", [1, end])
    (short,) = answers(base, rows(1))
    assert short.finish_reason == "stop" and short.completion_tokens == first
    assert whole.text.startswith(short.text)
    (exactly,) = answers(base, rows(1), max_new_tokens=[first])
    assert exactly == short


def test_pieces_of_all_rows_are_their_answers(base):
    pieces = [""] * 4

    def on_text(row, piece):
        assert piece
        pieces[row] += piece

    found = answers(base, rows(4), max_new_tokens=LIMITS, on_text=on_text)
    assert pieces == [answer.text for answer in found]
    assert found == answers(base, rows(4), max_new_tokens=LIMITS)


def test_a_row_that_is_stopped_ends_alone(base):
    asked, pieces = [0] * 3, [""] * 3

    def is_stopped(row):
        asked[row] += 1
        return row == 1 and asked[1] == 2

    def on_text(row, piece):
        pieces[row] += piece

    found = answers(base, rows(3), on_text=on_text, is_stopped=is_stopped)
    assert [answer.completion_tokens for answer in found] == [9, 2, 9]
    assert found[1].finish_reason == "stop" and found[1] != answers(base, rows(3))[1]
    assert [found[0], found[2]] == [answers(base, rows(3))[row] for row in (0, 2)]
    assert pieces == [answer.text for answer in found]
    assert asked == [8, 2, 8]  # no row is asked once it is at its end


def test_nothing_runs_on_when_all_rows_are_stopped(base):
    steps = []
    hook = base.model.register_forward_hook(lambda *_: steps.append(1))
    answers(base, rows(2), is_stopped=lambda row: True)
    hook.remove()
    assert len(steps) == 1


def test_what_a_listener_raises_ends_the_answers(base):
    def on_text(row, piece):
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        answers(base, rows(2), on_text=on_text)
    assert not torch.is_inference_mode_enabled()

"""A run on rows of every kind together: questions, captions, conversations about two images, and no image."""

import json

from finetune.evaluation.compare import evaluate
from finetune.runs.train import train
from finetune.serving.loading import load


def rows(images):
    image, text = {"type": "image"}, {"type": "text", "text": "Same color?"}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, image, text]},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "two"},
    ]
    return [
        {"image": images[0], "question": "What color is it?", "answer": ["red", "it is red"]},
        {"image": images[1], "question": "Describe it.", "captions": ["a blue one", "blue"]},
        {"images": images[:2], "messages": talk},
        {"images": [], "question": "How many?", "answer": "one"},
        {"images": [], "messages": [talk[0], talk[3], {"role": "assistant", "content": "three"}]},
    ]


def test_rows_of_every_kind_train_in_one_run(tiny_base, make_recipe, rows_folder, capsys):
    lines = [json.dumps(row) for row in rows(["images/0.png", "images/1.png", "images/2.png"])]
    (rows_folder / "train.jsonl").write_text("\n".join([*lines * 5, "{"]))
    for split in ("val", "test"):
        (rows_folder / f"{split}.jsonl").write_text("\n".join(lines))
    task = {"system_prompt": ""}  # two rows bring their own
    recipe = make_recipe(tiny_base, data={"on_error": "skip"}, train={"num_workers": 1, "max_steps": 4}, task=task)
    result = train(recipe)
    shown = capsys.readouterr().out
    assert "skipped 1 of 26 train rows" in shown and "not JSON: 1" in shown and "rows train 25, val 5, test 5" in shown
    assert "⟦ no<|end|>⟧<|user|>How many?<|end|><|assistant|>⟦ two<|end|>⟧" in shown
    (row,) = evaluate([result.ref], [recipe])
    assert row.scores.n == len(row.rows) == 5
    vlm = load(result.ref, base=str(tiny_base), device="cpu")
    assert isinstance(vlm.chat([{"role": "user", "content": "How many?"}]), str)
    assert isinstance(vlm.ask(None, "How many?"), str)

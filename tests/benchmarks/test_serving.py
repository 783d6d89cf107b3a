"""The benchmark of the server on a model of a few layers: what it writes, and that it sees a wrong answer."""

import asyncio
import json
from dataclasses import replace

import pytest

from benchmarks.serving import REFUSED, Asked, ask_all, main, table
from tests.server.serving import QUESTION, running


@pytest.mark.distributed
def test_a_mixed_load_is_answered_by_the_right_adapters(tmp_path, capsys):
    file = tmp_path / "serving.json"
    with pytest.MonkeyPatch.context() as patch:  # the benchmark has places of its own
        patch.setenv("FINETUNE_CACHE", "")
        patch.setenv("FINETUNE_REGISTRY", "")
        few = ["--requests", "160", "--one-by-one", "20", "--at-once", "90", "--new-tokens", "6"]
        assert main(["--model", "tiny", *few, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    details = found.pop("details")
    assert found["wrong"] == found["failed"] == 0 and found["mean_batch_rows"] > 1
    assert found["requests_per_second"] > 0 and found["batched_vs_one_by_one"] > 0
    kinds = {status.partition(" ")[0] for status in details["statuses"]}
    assert kinds == {"text", "image", *REFUSED} and details["adapters"] == 8
    assert "answered by the wrong adapter: 0; failed: 0" in capsys.readouterr().out


def test_what_is_wrong_is_seen(tiny_fast_vlm):
    from finetune.assemble.loading import load_base
    from finetune.serving.vision_language_model import VisionLanguageModel

    vlm = VisionLanguageModel(load_base(str(tiny_fast_vlm), device="cpu"))
    good = Asked("text", "base", QUESTION, False, vlm.ask(None, QUESTION))
    streamed, other = replace(good, stream=True), replace(good, answer="other")
    refused = Asked("unknown", "a/b", QUESTION, True, None)
    with running(vlm) as server:
        asked = [good, streamed, other, refused, replace(good, model="a/b"), replace(refused, model="base")]
        found = asyncio.run(ask_all(server.url, asked, at_once=1))
    assert (found["wrong"], found["failed"]) == (2, 2)  # a refusal that had to come and did not has no right answer
    assert found["statuses"] == {"text 200": 3, "text 404": 1, "unknown 200": 1, "unknown 404": 1}
    figures = {"requests_per_second": 2.0, "one_by_one_per_second": 1.0, "batched_vs_one_by_one": 2.0}
    assert "2.00 times as many" in table(
        {**figures, "mean_batch_rows": 1.0, "wrong": 0, "failed": 0, "refused_429": 0}, found
    )


def test_a_full_server_is_asked_again(tiny_fast_vlm):
    from finetune.assemble.loading import load_base
    from finetune.serving.vision_language_model import VisionLanguageModel

    vlm = VisionLanguageModel(load_base(str(tiny_fast_vlm), device="cpu"))
    content = [{"type": "text", "text": QUESTION}]
    asked = [Asked("text", "base", content, False, vlm.ask(None, QUESTION))] * 12
    with running(vlm, max_queue=1, max_batch=1) as server:
        found = asyncio.run(ask_all(server.url, asked, at_once=6))
    assert found["wrong"] == found["failed"] == 0 and found["refused_429"] > 0

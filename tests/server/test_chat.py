"""OpenAI's own client, against a real server: every answer is the one that the adapter gives alone."""

import asyncio

import openai
import pytest

from finetune.recipe.task import DEFAULT_ANSWER_TOKENS
from tests.server.conftest import REFS
from tests.server.serving import QUESTION, body, data_url, image_part, png, text_part

IMAGE = png("blue")


def alone(vlm, ref, image, question=QUESTION):
    with vlm.using(ref):
        return vlm.ask(image, question)


def content(image, question=QUESTION):
    return question if image is None else [text_part(question), image_part(image)]


@pytest.fixture(scope="module")
def expected(loaded):
    """What each adapter says, asked alone, without an image and with one."""
    found = {(ref, image): alone(loaded, ref, image) for ref in [*REFS, None] for image in (None, IMAGE)}
    assert len(set(found.values())) == len(found), "no two may say the same"
    return found


@pytest.mark.parametrize("image", [None, IMAGE], ids=["text", "image"])
@pytest.mark.parametrize("ref", [*REFS, None])
def test_an_answer_is_the_adapters_own(server, expected, ref, image):
    with server.client() as client:
        found = client.chat.completions.create(
            model=ref or "base", messages=[{"role": "user", "content": content(image)}], temperature=0, seed=1, n=1
        )
    (choice,) = found.choices
    assert choice.message.content == expected[ref, image] and choice.message.role == "assistant"
    assert found.model == (ref or "base") and found.object == "chat.completion"
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    longest = 16 if ref else DEFAULT_ANSWER_TOKENS
    assert choice.finish_reason == ("length" if found.usage.completion_tokens == longest else "stop")


def test_a_stream_grows_to_the_answer_and_has_usage_on_request(server, expected):
    with server.client() as client:
        for ref in REFS:
            options = {"include_usage": True} if ref != REFS[0] else openai.omit
            stream = client.chat.completions.create(**body(ref), stream=True, stream_options=options)
            chunks = list(stream)
            whole = client.chat.completions.create(**body(ref))
            deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
            assert "".join(delta.content or "" for delta in deltas) == expected[ref, None]
            assert deltas[0].role == "assistant" and deltas[1].role is None
            ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
            assert ends == [None] * (len(ends) - 1) + [whole.choices[0].finish_reason]
            usage = [chunk.usage for chunk in chunks if chunk.usage]
            assert usage == ([] if ref == REFS[0] else [whole.usage])
            assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
            assert chunks[0].system_fingerprint == whole.system_fingerprint


def test_many_at_once_are_each_answered_by_their_own(server, expected):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(number, ref, image):
                messages = [{"role": "user", "content": content(image)}]
                if number % 2:
                    found = await client.chat.completions.create(model=ref or "base", messages=messages)
                    return found.choices[0].message.content
                text = ""
                async for chunk in await client.chat.completions.create(
                    model=ref or "base", messages=messages, stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            asked = list(expected) * 4
            return asked, await asyncio.gather(*(ask(number, *one) for number, one in enumerate(asked)))

    asked, answers = asyncio.run(ask_all())
    assert answers == [expected[one] for one in asked]


def test_a_question_is_put_as_the_adapter_was_trained_and_a_conversation_as_it_stands(server, loaded, monkeypatch):
    task = loaded.add(REFS[0]).manifest.task
    monkeypatch.setitem(vars(task), "question_template", "Is it a circle? {question} yes no")
    monkeypatch.setitem(vars(task), "system_prompt", "How many?")
    turns = [
        {"role": "user", "content": "What color is it?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "Is it a circle?"}]},
    ]
    with loaded.using(REFS[0]):
        asked, chatted = loaded.ask(None, QUESTION), loaded.chat(turns)
        plain = loaded.chat([{"role": "system", "content": "two"}, {"role": "user", "content": QUESTION}])
    assert server.ask(REFS[0]) == asked
    sent = [*turns[:2], {"role": "user", "content": [image_part(IMAGE), text_part("Is it a circle?")]}]
    with server.client() as client:
        found = client.chat.completions.create(model=REFS[0], messages=sent)
        own = [{"role": "developer", "content": "two"}, {"role": "user", "content": QUESTION}]
        completion = client.chat.completions.create(model=REFS[0], messages=own)
    assert found.choices[0].message.content == chatted
    assert completion.choices[0].message.content == plain
    assert len({asked, chatted, plain}) == 3


def test_what_was_answered_can_be_sent_back_as_it_came(server):
    messages = [{"role": "user", "content": QUESTION}]
    with server.client() as client:
        first = client.chat.completions.create(model="base", messages=messages).choices[0].message
        for reply in (first, first.model_dump()):
            again = [*messages, reply, {"role": "user", "content": "Is it red?"}]
            assert client.chat.completions.create(model="base", messages=again).choices[0].message.content


def test_an_answer_ends_at_its_limit_and_at_a_stop_text(server, expected):
    whole = expected[REFS[0], None]
    with server.client() as client:
        found = client.chat.completions.create(**body(REFS[0]), max_completion_tokens=2)
        assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 2
        assert client.chat.completions.create(**body(REFS[0]), max_tokens=2).choices == found.choices
        stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
        before = whole[: whole.index(stop)]
        for options in ({"stop": stop}, {"stop": ["never said", stop]}):
            found = client.chat.completions.create(**body(REFS[0]), **options)
            assert (found.choices[0].message.content, found.choices[0].finish_reason) == (before, "stop")
            chunks = list(client.chat.completions.create(**body(REFS[0]), **options, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before
        longest = client.chat.completions.create(**body(REFS[0]))
        assert found.usage.completion_tokens < longest.usage.completion_tokens  # no token follows the stop
        assert client.chat.completions.create(**body(REFS[0]), stop="never said").choices == longest.choices
        last = client.chat.completions.create(**body(REFS[0]), max_tokens=1, stop=whole[0]).choices[0]
        assert (last.message.content, last.finish_reason) == ("", "stop")


def test_models_are_listed_and_retrieved(server):
    with server.client() as client:
        assert {model.id for model in client.models.list()} == {"base", *REFS}
        found = client.models.retrieve(REFS[0])
        assert (found.id, found.owned_by) == (REFS[0], "testing") and found.created > 1_600_000_000
        with pytest.raises(openai.NotFoundError, match="must name an adapter .*, got .testing/other."):
            client.models.retrieve("testing/other")


def test_metrics_count_requests_tokens_and_batches(server):
    def read():
        lines = server.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = read()
    with server.client() as client:
        usage = client.chat.completions.create(**body(REFS[1])).usage
        client.chat.completions.create(**body("base"))
    server.post(body("testing/none"))
    server.post(body(REFS[1], temperature=2))
    after = read()

    def grown(name):
        return after.get(name, 0) - before.get(name, 0)

    assert grown(f'finetune_requests_total{{adapter="{REFS[1]}",status="200"}}') == 1
    assert grown('finetune_requests_total{adapter="unknown",status="404"}') == 1
    assert grown('finetune_requests_total{adapter="unknown",status="400"}') == 1
    assert grown(f'finetune_tokens_total{{adapter="{REFS[1]}",kind="prompt"}}') == usage.prompt_tokens
    assert grown(f'finetune_tokens_total{{adapter="{REFS[1]}",kind="completion"}}') == usage.completion_tokens
    assert grown("finetune_batch_rows_count") == 2 and grown("finetune_adapter_switches_total") >= 1
    assert after["finetune_waiting"] == 0 and after["finetune_resident_adapters"] == len(REFS)
    assert not [name for name in after if "testing/none" in name]


def test_an_image_by_url_is_fetched_where_that_is_allowed(loaded, expected, monkeypatch):
    from tests.server.serving import running

    fetched = []

    def fetch(url, policy):
        fetched.append((url, policy.allow_private))
        return IMAGE

    monkeypatch.setattr("finetune.server.request_images.fetch_image", fetch)
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    with running(loaded, REFS, allow_urls=True) as server:
        found = server.post(body(REFS[0], [text_part(QUESTION), part])).json()
    assert found["choices"][0]["message"]["content"] == expected[REFS[0], IMAGE]
    assert fetched == [("https://example.org/a.png", ())]
    assert data_url(IMAGE) not in str(fetched)


def test_all_images_by_url_share_the_limit_of_a_request(loaded, monkeypatch):
    from tests.server.serving import running

    left = []
    monkeypatch.setattr(
        "finetune.server.request_images.fetch_image", lambda _, policy: left.append(policy.max_bytes) or IMAGE
    )
    first, second = ({"type": "image_url", "image_url": {"url": f"https://example.org/{name}.png"}} for name in "ab")
    with running(loaded, REFS, allow_urls=True, max_body_bytes=10_000) as server:
        assert server.post(body(REFS[0], [text_part(QUESTION), first, second, first])).status_code == 200
    assert left == [10_000, 10_000 - len(IMAGE)]  # what is named twice is fetched once

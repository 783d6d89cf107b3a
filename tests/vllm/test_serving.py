"""The plugin in vLLM's own API server: references in requests, and which adapter vLLM then uses."""

import json

import pytest

from finetune.assemble.loading import load_base
from finetune.registry import AdapterRegistry
from tests.serving.adapters import make_adapter
from tests.tiny import save_fast_vlm

pytestmark = pytest.mark.vllm
NAME = "testing/cell"
PLUGIN = {"VLLM_PLUGINS": "finetune_registry", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def chat(model, path="/v1/chat/completions", **more):
    return {"path": path, "json": {"model": model, "messages": [{"role": "user", "content": "hi"}]}, **more}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny base and a registry: version 1 and 3 answer, version 2 is a DoRA, version 4 of another base."""
    folder = tmp_path_factory.mktemp("published")
    registry = AdapterRegistry(folder / "registry")
    digests = []
    for seed, (kind, base_seed) in enumerate([("lora", 0), ("dora", 0), ("lora", 0), ("lora", 1)]):
        path = folder / f"base{base_seed}"
        if not path.exists():
            save_fast_vlm(path, seed=base_seed)
        adapter = make_adapter(load_base(str(path), device="cpu"), kind, folder / str(seed), seed=seed)
        digests.append(registry.publish(adapter).digest)
    registry.alias(NAME, "prod", 1)
    return {"base": str(folder / "base0"), "registry": registry.location, "digests": digests}


@pytest.fixture(scope="module")
def walk(published, inside):
    """Steps by name, and what vLLM's server made of them, in one process of its own."""
    first, *_ = published["digests"]
    steps = {
        "base": chat("served/base"),
        "no key": chat(f"{NAME}@1", key=False),
        "prod": chat(f"{NAME}@prod"),
        "prod again": chat(f"{NAME}@prod"),
        "move": {"name": NAME, "alias": "prod", "version": 3},
        "prod moved": chat(f"{NAME}@prod"),
        "by digest": chat(f"{NAME}@sha256:{first}"),
        "by number": chat(f"{NAME}@1"),
        "move to a dora": {"name": NAME, "alias": "prod", "version": 2},
        "prod at a dora": chat(f"{NAME}@prod"),
        "dora": chat(f"{NAME}@2"),
        "other base": chat(f"{NAME}@4"),
        "no version": chat(f"{NAME}@99"),
        "no adapter": chat("testing/nothing@prod"),
        "no digest": chat(f"{NAME}@sha256:{'0' * 64}"),
        "traversal": chat("../../../../etc"),
        "absolute": chat("/etc/passwd"),
        "list": {"path": "/v1/models", "method": "GET"},
        "load": {"path": "/v1/load_lora_adapter", "json": {"lora_name": "x", "lora_path": "/tmp"}},
        "load, sagemaker": {"path": "/adapters", "json": {"name": "x", "src": "/tmp"}, "key": False},
        "unload": {"path": "/v1/unload_lora_adapter", "json": {"lora_name": f"{NAME}@sha256:{first}"}},
        "unload, sagemaker": {"path": f"/adapters/{NAME}@sha256:{first}", "method": "DELETE", "key": False},
    }
    given = {"base": published["base"], "registry": published["registry"], "steps": list(steps.values())}
    found = inside("serving", given, FINETUNE_REGISTRY=published["registry"], **PLUGIN)
    assert found["start"] == "" and found["resolvers"] == ["finetune_registry"]
    found = dict(zip(steps, found["steps"], strict=True))
    print(*(f"{name}: {result}" for name, result in found.items()), sep="\n")
    return found


def served(published, number):
    return f"{NAME}@sha256:{published['digests'][number - 1]}"


def test_an_alias_that_moves_is_seen(walk, published):
    assert walk["prod"]["json"]["model"] == walk["prod again"]["json"]["model"] == served(published, 1)
    assert walk["prod moved"]["json"]["model"] == served(published, 3)
    assert walk["by digest"]["json"]["model"] == walk["by number"]["json"]["model"] == served(published, 1)
    first, moved = (walk[name]["json"]["usage"]["prompt_tokens"] for name in ("prod", "prod moved"))
    assert walk["by digest"]["json"]["usage"]["prompt_tokens"] == first != moved  # vLLM's own number of an adapter


def test_an_alias_that_moves_to_what_cannot_be_served_stays(walk, published):
    assert walk["prod at a dora"]["json"]["model"] == served(published, 3)


def test_the_base_answers_by_its_name(walk):
    assert (walk["base"]["status"], walk["base"]["json"]["model"]) == (200, "served/base")


@pytest.mark.parametrize("name", ["dora", "other base"])
def test_what_is_refused(walk, name):
    assert walk[name]["status"] == 400
    assert "The reason is in the server's log" in walk[name]["json"]["error"]["message"]


@pytest.mark.parametrize("name", ["no version", "no adapter", "no digest"])
def test_what_is_not_there(walk, name):
    assert walk[name]["status"] == 404
    assert "does not exist in the registry" in walk[name]["json"]["error"]["message"]


@pytest.mark.parametrize("name", ["traversal", "absolute"])
def test_what_is_no_reference_is_vllm_s_to_answer(walk, name):
    assert walk[name]["status"] == 404 and "does not exist" in walk[name]["json"]["error"]["message"]


def test_nothing_is_looked_up_without_the_key(walk):
    assert walk["no key"] == {"status": 401, "json": {"error": "Unauthorized"}}


@pytest.mark.parametrize("name", ["load", "load, sagemaker", "unload", "unload, sagemaker"])
def test_the_routes_that_load_any_folder_are_closed(walk, name):
    assert walk[name]["status"] == 403


def test_its_models_are_named_by_digest(walk, published):
    ids = [model["id"] for model in walk["list"]["json"]["data"]]
    assert ids == ["served/base", served(published, 1), served(published, 3)]


def test_without_the_plugin_s_name_nothing_is_served_and_vllm_s_routes_are_open(published, inside):
    pinned = chat(f"{NAME}@sha256:{published['digests'][0]}")
    load = {"path": "/adapters", "json": {"name": "x", "src": "/nowhere"}, "key": False}
    environment = {"FINETUNE_REGISTRY": published["registry"], "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    found = inside("serving", {**published, "steps": [chat(f"{NAME}@1"), pinned, load]}, **environment)
    assert [result["status"] for result in found["steps"][:2]] == [404, 404]
    opened = found["steps"][2]
    print(f"/adapters without the key: {opened}")
    assert opened["status"] not in (401, 403) and "/nowhere" in json.dumps(opened["json"])


def test_it_does_not_start_where_vllm_would_not_ask(published, inside):
    found = inside(
        "serving",
        {**published, "steps": []},
        FINETUNE_REGISTRY=published["registry"],
        **{**PLUGIN, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"},
    )
    assert "LaunchError: finetune_registry needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and it is" in found["start"]


def test_without_a_registry_it_is_not_there(published, inside):
    found = inside("serving", {**published, "steps": [chat(f"{NAME}@1")]}, FINETUNE_REGISTRY="", **PLUGIN)
    assert "finetune_registry" not in found["resolvers"]
    assert found["steps"][0]["status"] == 404

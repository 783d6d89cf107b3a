"""The classes that vLLM calls, with stand-ins for those of vLLM's that they use."""

import asyncio
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette

from finetune.errors import FinetuneError, LaunchError, TrustError
from finetune.vllm_plugin import register
from finetune.vllm_plugin.name import NAME as PLUGIN
from tests.vllm_plugin.conftest import NAME


@pytest.fixture
def resolver(stand_in, registry, monkeypatch):
    monkeypatch.setenv("FINETUNE_REGISTRY", registry.location)
    register()
    return stand_in.resolvers.get_resolver(PLUGIN)


def resolve(resolver, name):
    return asyncio.run(resolver.resolve_lora("base", name))


def engine(base, *, lora=8, tokenizer=None, hf_overrides=None, mm_processor_kwargs=None):
    model = SimpleNamespace(
        model=str(base),
        revision=None,
        tokenizer=tokenizer or str(base),
        hf_overrides=hf_overrides or {},
        multimodal_config=SimpleNamespace(mm_processor_kwargs=mm_processor_kwargs),
    )
    config = SimpleNamespace(model_config=model, lora_config=lora and SimpleNamespace(max_lora_rank=lora))
    return SimpleNamespace(vllm_config=config, model_config=model)


def start(base, *, chat_template=None, **more):
    from finetune.vllm_plugin.endpoint import RegistryEndpoint

    plugin, app = RegistryEndpoint(), Starlette()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine(base, **more), app.state, Namespace(chat_template=chat_template)))
    return app


def test_a_digest_becomes_a_request_of_vllm(resolver, served):
    resolver.served = served
    pinned = served.pinned(f"{NAME}@1")
    found = resolve(resolver, pinned)
    assert (found.lora_name, found.lora_path) == (pinned, str(served.folder(pinned)))


@pytest.mark.parametrize("name", [f"{NAME}@prod", NAME, f"{NAME}@1"])
def test_vllm_never_gets_a_reference_that_can_move(resolver, served, name, caplog):
    resolver.served = served
    assert resolve(resolver, name) is None
    assert "vLLM would not notice when the alias moves" in caplog.text


@pytest.mark.parametrize("name", ["gpt-4", "../../etc/passwd", "/etc", ""])
def test_what_is_no_reference_is_left_to_others(resolver, served, name, caplog):
    resolver.served = served
    assert resolve(resolver, name) is None
    assert not caplog.text


def test_a_refusal_is_logged_and_no_crash(resolver, served, caplog):
    resolver.served = served
    assert resolve(resolver, f"{NAME}@sha256:{'0' * 64}") is None
    assert "is not served: " in caplog.text and "0000 does not exist" in caplog.text


def test_nothing_is_served_before_the_base_is_known(resolver, registry, caplog):
    assert resolve(resolver, f"{NAME}@sha256:{registry.resolve(NAME).digest}") is None
    assert f"VLLM_PLUGINS must name {PLUGIN}, and does not" in caplog.text


def test_without_a_registry_nothing_is_registered(stand_in, monkeypatch, caplog):
    monkeypatch.delenv("FINETUNE_REGISTRY")
    with caplog.at_level("INFO"):
        register()
    assert not stand_in.resolvers.resolvers
    assert "FINETUNE_REGISTRY is not set" in caplog.text


def test_registering_twice_keeps_the_first(resolver, stand_in):
    register()
    assert stand_in.resolvers.get_resolver(PLUGIN) is resolver


def test_another_version_of_vllm_gets_a_warning(stand_in, monkeypatch, tmp_path, caplog):
    stand_in.versions["vllm"] = "0.34.0+cpu"
    register()
    assert "was tested with vLLM 0.33.0, got 0.34.0" in caplog.text


def test_the_same_version_for_another_device_is_the_same(stand_in, caplog):
    stand_in.versions["vllm"] = "0.33.0+cpu"
    register()
    assert not caplog.text


def test_the_endpoint_identifies_the_base(resolver, published):
    app = start(published.base)
    assert [middleware.cls.__name__ for middleware in app.user_middleware] == ["PinnedModels"]
    assert app.user_middleware[0].kwargs["served"]() is resolver.served
    assert resolve(resolver, resolver.served.pinned(f"{NAME}@prod")) is not None


def test_a_template_that_was_not_trained_with(resolver, published, tmp_path):
    (tmp_path / "template.jinja").write_text("{{ other }}")
    start(published.base, chat_template=str(tmp_path / "template.jinja"))
    with pytest.raises(FinetuneError, match="another chat template"):
        resolver.served.pinned(f"{NAME}@1")


def test_settings_that_cannot_be_combined(resolver, published, stand_in, monkeypatch):
    with pytest.raises(LaunchError, match="vLLM runs without it. Start vLLM with --enable-lora"):
        start(published.base, lora=None)
    monkeypatch.setattr(stand_in.envs, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", False)
    with pytest.raises(LaunchError, match="needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and it is not set"):
        start(published.base)
    monkeypatch.setattr(stand_in.envs, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", True)
    monkeypatch.setattr(stand_in.envs, "VLLM_SKIP_MODEL_NAME_VALIDATION", True)
    with pytest.raises(LaunchError, match="does not allow VLLM_SKIP_MODEL_NAME_VALIDATION"):
        start(published.base)


@pytest.mark.parametrize(
    "more",
    [{"tokenizer": "other"}, {"hf_overrides": {"a": 1}}, {"mm_processor_kwargs": {"max_pixels": 4}}],
    ids=["tokenizer", "hf_overrides", "mm_processor_kwargs"],
)
def test_settings_that_make_another_base_of_it(resolver, published, more):
    (name,) = more
    with pytest.raises(LaunchError, match=f"got --{name.replace('_', '-')} .*. Remove the option"):
        start(published.base, **more)
    assert resolver.served is None


def test_a_trust_policy_of_no_use_ends_the_start(resolver, published, monkeypatch, tmp_path):
    (tmp_path / "trust.yaml").write_text("keys: nobody\n")
    monkeypatch.setenv("FINETUNE_TRUST", str(tmp_path / "trust.yaml"))
    with pytest.raises(TrustError, match="keys: Input should be a valid list"):
        start(published.base)
    assert resolver.served is None


def test_the_endpoint_does_nothing_without_a_registry(stand_in, published, monkeypatch):
    monkeypatch.delenv("FINETUNE_REGISTRY")
    register()
    assert not start(published.base).user_middleware


def test_both_entry_points_have_one_name():
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        assert PLUGIN in {point.name for point in entry_points(group=group)} or not entry_points(group=group)


def test_it_loads_what_the_core_brings_and_torch():
    code = (
        "import sys, finetune.vllm_plugin.served, finetune.vllm_plugin.middleware; "
        "print([m for m in ('peft', 'transformers', 'datasets', 'accelerate', 'PIL', 'vllm') if m in sys.modules]); "
        "print(*sorted({m.split('.')[1] for m in sys.modules if m.startswith('finetune.')}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == "[]"
    assert out[1].split() == [
        "adapters", "core", "errors", "export", "lookup", "methods", "metrics", "model_types", "plugins", "recipe",
        "serving", "tables", "vllm_plugin",
    ]  # fmt: skip

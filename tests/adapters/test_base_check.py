"""A base is checked by its files, and the hub by one short question."""

import json
import shutil

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from finetune.adapters import base_check
from finetune.adapters.base_check import check_base
from finetune.core import lfs
from finetune.errors import ModelError


def test_every_family_and_the_embedded_base_pass(tiny_family):
    check_base(str(tiny_family))
    check_base("pocket")


@pytest.fixture
def base(tiny_fast_vlm, tmp_path):
    return shutil.copytree(tiny_fast_vlm, tmp_path / "base")


def refused(base):
    with pytest.raises(ModelError) as error:
        check_base(str(base))
    return str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_names_the_command_to_run(base, name):
    (base / name).write_bytes(lfs.BEGINNING + b"v1\noid sha256:00\nsize 12\n")
    assert f"{base / name}: a Git LFS pointer and not the file itself. Run `git lfs pull` in {base}" in refused(base)


def test_weights_that_are_cut_short_or_none_are_named(base):
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert f"must have the {len(whole)} bytes that its header describes, got {len(whole) - 1}" in refused(base)
    weights.write_bytes(whole[:20])
    assert "must be a complete safetensors file, but its header cannot be read" in refused(base)
    weights.write_bytes(b"PK")
    assert "must be a complete safetensors file, but its header cannot be read" in refused(base)
    weights.unlink()
    assert "must hold safetensors weights (model.safetensors), and does not" in refused(base)


def test_a_weight_file_of_the_index_that_is_missing_is_named(base):
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "must hold the 1 weight files of its index, but 1 are missing, such as model-1.safetensors" in refused(base)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{", "config.json: not JSON"),
        ("[1]", "must hold a JSON object"),
        ("{}", "config.json must have a model_type, got None"),
        ('{"model_type": "lava"}', "Did you mean 'llava'?"),
    ],
)
def test_a_config_that_is_none_is_named(base, config, text):
    (base / "config.json").write_text(config)
    assert text in refused(base)


def test_a_type_that_only_transformers_knows_passes(base):
    (base / "config.json").write_text('{"model_type": "aya_vision"}')
    check_base(str(base))


def test_a_folder_of_folders_names_the_models_in_it(base):
    assert f"Models below it: {base}." in refused(base.parent)


def test_a_path_with_a_typo_is_answered_without_the_hub(base, monkeypatch):
    monkeypatch.setattr(base_check, "_check_hub", None)
    assert f"Did you mean '{base}'?" in refused(base.with_name("bsae"))
    assert "no such folder below" in refused("models/vlm/here")
    assert "a base must be a folder" in refused(base / "config.json")


# The hub


@pytest.fixture
def hub(monkeypatch):
    """Return a function that sets what the hub answers to the one question; the time it had is kept."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def answers(error):
        def get(url, *, timeout):
            asked.append((url, timeout))
            if error:
                raise error

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", get)
        return asked

    return answers


def response(status):
    return httpx2.Response(status, request=httpx2.Request("HEAD", "https://hub"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (httpx2.ConnectError("Name or service not known"), "the hub could not be reached within 5 s"),
        (httpx2.ConnectTimeout("timed out"), "the hub could not be reached within 5 s"),
        (RepositoryNotFoundError("404: no such repository", response=response(404)), "the hub answers: 404"),
        (GatedRepoError("403", response=response(403)), "is gated on the hub, and this account has no access"),
    ],
)
def test_a_hub_id_is_asked_for_once_and_shortly(error, text, hub):
    asked = hub(error)
    message = refused("acme/vlm")
    assert text in message and "`hf download acme/vlm --local-dir FOLDER`" in message
    [(url, timeout)] = asked
    assert url.endswith("/acme/vlm/resolve/main/config.json") and timeout == 5


def test_a_hub_id_that_is_there_passes(hub):
    hub(None)
    check_base("acme/vlm")


def test_an_error_of_the_program_is_not_hidden(hub):
    hub(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        check_base("acme/vlm")


def test_offline_the_hub_is_not_asked(hub, monkeypatch):
    asked = hub(None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "(HF_HUB_OFFLINE is set)" in refused("acme/vlm") and not asked

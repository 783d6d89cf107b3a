"""Adapters of another base, another processor or another task, and probes that do not show what they should."""

import json
import math
import shutil
import warnings

import pytest
import torch

from finetune.errors import BaseMismatchError, FinetuneError, ManifestError, ModelError, ProbeError
from finetune.serving.loading import load
from tests.safety.forging import Case, Forgery, names, pickled
from tests.safety.test_json import put
from tests.tiny import FAMILIES

ZERO = "0" * 64


def prompt(**fields):
    return lambda forgery: forgery.manifest["task"].update(fields)


def prompt_spec(**fields):
    def forge(forgery: Forgery) -> None:
        forgery.manifest["task"] = fields

    return forge


def probe(**fields):
    return lambda forgery: forgery.manifest["probe"].update(fields)


def probe_values(change, *which: str):
    """Changes every recorded value."""

    def forge(forgery: Forgery) -> None:
        for name in which or ("base", "adapter"):
            rows = forgery.manifest["probe"][name]
            forgery.manifest["probe"][name] = [[change(value) for value in row] for row in rows]

    return forge


def all_noise(forgery: Forgery) -> None:
    forgery.manifest["probe"] |= {"base": [[1e12] * 64] * 4, "adapter": [[1e12] * 64] * 4}


BASES = [
    ("another base of equal shapes", put({"model.safetensors": ZERO}, "base", "files"), "model.safetensors has sha256"),
    ("a base with other files", put({"other.safetensors": ZERO}, "base", "files"), "its weight files are .*not"),
    ("another config of a base", put(ZERO, "base", "config"), "its config.json differs"),
    ("another kind of base", put("llava", "base", "model_type"), "its model_type is qwen2_5_vl, not llava"),
    ("10,000 weight files", put({f"f{i}": ZERO for i in range(10_000)}, "base", "files"), "its weight files are"),
    ("another tokenizer", put(ZERO, "processor", "tokenizer"), "trained with another tokenizer .digest"),
    ("another processor", put(ZERO, "processor", "processor_config"), "trained with another processor config"),
    ("another chat template", put(ZERO, "processor", "chat_template"), "trained with another chat template"),
    ("another end of answers", put(ZERO, "processor", "generation_config"), "trained with another generation config"),
]
PROMPTS = [
    ("a template without its place", prompt(question_template="hi"), "must hold .question. exactly once"),
    (
        "a template with two places",
        prompt(question_template="{question}{question}"),
        "must hold .question. exactly once",
    ),
    ("a template of a megabyte", prompt(question_template="{question}" + "x" * 2**20), "at most 65536 characters"),
    ("a system prompt of a megabyte", prompt(system_prompt="<|end|>" * 2**17), "at most 65536 characters"),
    ("a prompt that is a list", prompt(system_prompt=["x"]), "system_prompt: Input should be a valid string"),
    ("an answer of 1e9 tokens", prompt(max_new_tokens=10**9), "less than or equal to 100000"),
    ("an answer without tokens", prompt(max_new_tokens=0), "greater than or equal to 1"),
    ("answers by chance", prompt(do_sample=True), "task.do_sample: Extra"),
    ("5 beams", prompt(num_beams=5), "task.num_beams: Extra"),
    ("code of its own", prompt(custom_generate="evil/x"), "task.custom_generate: Extra"),
    (
        "another normalisation",
        prompt(answer_normalization="os.system"),
        "answer_normalization: Input should be 'exact', 'vqa' or",
    ),
    ("an unknown task", prompt(name="os.system"), "plugins must name the package of the task 'os.system'"),
    ("a task for a terminal", prompt(name="\x1b[2J" * 100), "task.name: String should match pattern"),
    (
        "a task of dual encoders",
        prompt_spec(name="contrastive", text_template="{label}", answer_normalization="vqa"),
        "the task must fit the architecture of the base",
    ),
]
PROBES = [
    ("a probe of text", probe(base=[["x"]] * 4), ManifestError, "probe.base.0.0: Input should be a valid number"),
    (
        "a probe beyond all numbers",
        probe(base=[[10**400] * 64] * 4),
        ManifestError,
        "probe.base.0.0|too large|not JSON",
    ),
    (
        "a huge probe",
        probe(base=[[0.0] * 10_000] * 4),
        ManifestError,
        "probe.base.0: List should have at most 64 items",
    ),
    ("a long probe", probe(base=[[0.0]] * 20_000), ManifestError, "probe.base: List should have at most 4 items"),
    ("an empty probe", probe(base=[[]] * 4), ManifestError, "at least 1 item"),
    ("a ragged probe", probe(base=[[0.0], [0.0, 1.0]]), ManifestError, "rows must have equal lengths, got 1, 2"),
    (
        "a smaller probe",
        probe(base=[[0.0]] * 4, adapter=[[1.0]] * 4),
        ProbeError,
        r"of this model's outputs, got \[4, 1\]",
    ),
    (
        "a probe of other versions",
        probe(version=99),
        ProbeError,
        "the probe of the adapter must have version 1, got 99",
    ),
    ("a seed below zero", probe(seed=-1), ManifestError, "probe.seed: Input should be greater than or equal to 0"),
    ("a seed beyond 32 bits", probe(seed=2**40), ManifestError, "probe.seed: Input should be less than"),
    ("a seed of chance", probe(seed=2**32 - 1), ProbeError, "must have the effect that it had when it was saved"),
    ("an unknown dtype", probe(dtype="float8"), ManifestError, "probe.dtype: Input should be 'float32'"),
    (
        "an unknown quantization",
        probe(quantization="1bit"),
        ManifestError,
        "probe.quantization: Input should be '4bit'",
    ),
    (
        "a probe without effect",
        probe_values(lambda value: 0.0),
        ProbeError,
        "the recorded effect is 0, and they differ by",
    ),
    (
        "a probe whose squares overflow",
        probe_values(lambda value: 1e30, "adapter"),
        ProbeError,
        "the recorded effect is 1.6e.31",
    ),
    (
        "a probe whose squares overflow fp64",
        probe_values(lambda value: 1e300, "adapter"),
        ProbeError,
        "the recorded effect is inf",
    ),
    (
        "a probe beyond fp32",
        probe_values(lambda value: 1e39, "base"),
        ProbeError,
        "must have the effect that it had when it was saved",
    ),
    ("a base beside which all is noise", all_noise, ProbeError, "the recorded effect is 0, and they differ by"),
    (
        "a probe turned round",
        probe_values(lambda value: -value),
        ProbeError,
        "must have the effect that it had when it was saved",
    ),
]
CASES = [
    *(Case(name, forge, BaseMismatchError, message) for name, forge, message in BASES),
    *(Case(name, forge, ManifestError, message) for name, forge, message in PROMPTS),
    *(Case(name, forge, error, message) for name, forge, error, message in PROBES),
]


@pytest.mark.parametrize("case", CASES, ids=names)
def test_what_does_not_fit_is_refused(refused, case):
    refused(case)


def test_an_effect_too_small_to_verify_leaves_no_ghost_where_warnings_are_errors(stage, tmp_path, canary):
    def quiet(forgery: Forgery) -> None:
        forgery.tensors = {n: t * 1e-7 if "lora_B" in n else t for n, t in forgery.tensors.items()}
        forgery.manifest["probe"]["adapter"] = forgery.manifest["probe"]["base"]

    folder = Case("quiet", quiet, ProbeError, "").make(stage.good["lora"], tmp_path / "adapter")
    with stage.unharmed(folder, canary), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="below the noise of torch.float32, so the load could not verify"):
            stage.vlm.add(folder)


def changed_base(stage, folder, change):
    shutil.copytree(stage.base, folder)
    change(folder)
    return folder


def edit(name, **fields):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def other_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def other_tokens(folder):
    path = folder / "tokenizer.json"
    text = json.loads(path.read_text())
    text["added_tokens"][0]["special"] = not text["added_tokens"][0]["special"]
    path.write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_template, "trained with another chat template"),
        (other_tokens, "trained with another tokenizer"),
        (edit("generation_config.json", eos_token_id=2), "trained with another generation config"),
        (edit("config.json", image_token_id=1), "its config.json differs"),
    ],
    ids=["template", "tokenizer", "generation", "config"],
)
def test_a_base_that_was_changed_takes_no_adapter(stage, tmp_path, change, message):
    """The same from the other side: the adapter is good, the base is another."""
    base = changed_base(stage, tmp_path / "base", change)
    with pytest.raises(BaseMismatchError, match=message):
        load(stage.good["lora"], base=str(base), device="cpu")


def test_a_base_of_equal_shapes_takes_no_adapter(stage, tmp_path):
    twin = FAMILIES["qwen2_5_vl"](tmp_path / "twin", seed=1)
    with pytest.raises(BaseMismatchError, match="trained on another base: model.safetensors has sha256"):
        load(stage.good["lora"], base=str(twin), device="cpu")


def adapter_in_base(stage, folder):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(stage.good["lora"] / name, folder / name)


def only_pickled(stage, folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled(folder.parent / "canary"))


def pickled_weights(stage, folder):
    (folder / "model.safetensors").write_bytes(pickled(folder.parent / "canary"))


def code_beside(folder):
    """A module that writes the canary as soon as it is imported, for transformers to find."""
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'canary')!r}, 'w').close()\n")
    return "evil.Evil"


def config_code(stage, folder):
    edit("config.json", auto_map={"AutoConfig": code_beside(folder)}, model_type="evil")(folder)


def model_code(stage, folder):
    code = code_beside(folder)
    auto = {"AutoConfig": code, "AutoModelForImageTextToText": code, "AutoProcessor": code}
    edit("config.json", auto_map=auto, trust_remote_code=True)(folder)
    edit("processor_config.json", auto_map=auto, trust_remote_code=True)(folder)
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": [code, code]}, trust_remote_code=True)(folder)


def processor_code(stage, folder):
    edit("processor_config.json", auto_map={"AutoProcessor": code_beside(folder)}, processor_class="Evil")(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            adapter_in_base,
            "must not hold an adapter_config.json: transformers would silently load that adapter with the base",
        ),
        (
            only_pickled,
            "must hold safetensors weights .model.safetensors., and does not.* other formats are not loaded",
        ),
        (pickled_weights, "must be a complete safetensors file"),
        (config_code, "contains custom code which must be executed"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_hostile_base_is_refused(stage, tmp_path, canary, change, message):
    base = changed_base(stage, tmp_path / "base", lambda folder: change(stage, folder))
    with pytest.raises(ModelError, match=message):
        load("base", base=str(base), device="cpu")
    assert not canary.exists()


@pytest.mark.parametrize("change", [model_code, processor_code])
def test_code_beside_a_base_is_never_run(stage, tmp_path, canary, change):
    """transformers has classes of its own for these; whether it takes them or gives up, the code is not asked."""
    base = changed_base(stage, tmp_path / "base", lambda folder: change(stage, folder))
    try:
        vlm = load("base", base=str(base), device="cpu")
    except FinetuneError:
        vlm = None
    assert not canary.exists()
    assert vlm is None or math.isfinite(float(torch.linalg.norm(vlm.base.probe(0))))


@pytest.mark.parametrize(
    ("hub_id", "error", "message"),
    [
        ("nobody/evil", ModelError, "no model at 'nobody/evil'"),
        ("evil", BaseMismatchError, "this machine knows no folder of it. Give its folder: base=PATH"),
        (None, BaseMismatchError, "this machine knows no folder of it. Give its folder: base=PATH"),
    ],
)
def test_a_manifest_does_not_choose_the_folder_of_its_base(
    stage, tmp_path, canary, monkeypatch, hub_id, error, message
):
    """Not even where a folder of that name stands in the working directory, with code in it."""
    base = changed_base(stage, tmp_path / "evil", lambda folder: model_code(stage, folder))
    assert base.is_dir()
    monkeypatch.chdir(tmp_path)

    def elsewhere(forgery: Forgery) -> None:
        forgery.manifest["base"] |= {"files": {"model.safetensors": ZERO}, "hub_id": hub_id}

    folder = Case("elsewhere", elsewhere, error, "").make(stage.good["lora"], tmp_path / "adapter")
    with pytest.raises(error, match=message):
        load(folder, device="cpu")
    assert not canary.exists()

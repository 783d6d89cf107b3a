"""Loading a base again shares its weights and nothing else, as long as it is the same base."""

import gc
import json
import shutil
import threading
import weakref

import pytest
import torch

import finetune.serving.shared_bases as shared_bases
from finetune.assemble.loading import load_base
from finetune.errors import ModelError, NotFoundError
from finetune.registry import AdapterRegistry
from finetune.serving.loading import load
from tests.matrix import rows
from tests.serving.adapters import make_adapter


@pytest.fixture(scope="module", params=["smolvlm", "qwen2_5_vl"])  # the second keeps positions on the module
def served(request, tmp_path_factory):
    """The folder of a base, and two adapters for it."""
    from tests.tiny import FAMILIES

    folder = tmp_path_factory.mktemp("shared")
    path = FAMILIES[request.param](folder / "base")
    base = load_base(str(path), device="cpu")
    return path, [make_adapter(base, kind, folder / kind, seed=1) for kind in ("lora", "dora")]


@pytest.fixture
def own_copy(tiny_fast_vlm, tmp_path):
    """A base's folder that a test may change."""
    return shutil.copytree(tiny_fast_vlm, tmp_path / "base")


def tensors(vlm):
    return [*vlm.model.parameters(), *vlm.model.buffers()]


def share(one, other):
    return all(mine is theirs for mine, theirs in zip(tensors(one), tensors(other), strict=True))


def plain(folder, **options):
    return load("base", base=str(folder), device="cpu", **options)


def test_two_models_share_weights_and_no_module(served):
    path, (adapter, _) = served
    one, other = load(adapter, base=str(path), device="cpu"), plain(path)
    assert share(one, other)
    assert one.processor is other.processor and one.base.preparing is other.base.preparing
    assert not {id(module) for module in one.model.modules()} & {id(module) for module in other.model.modules()}
    assert one.base.identity == other.base.identity and one.model is one.base.model


def test_what_one_model_uses_is_not_what_another_answers(served):
    path, (lora, dora) = served
    one, other, third = load(lora, base=str(path), device="cpu"), load(dora, base=str(path)), plain(path)
    alone = [vlm.base.probe(0) for vlm in (one, other, third)]
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[0], alone[2])
    assert [len(vlm.switcher.loaded_adapters) for vlm in (one, other, third)] == [1, 1, 0]
    third.use(dora)
    other.use(lora)
    assert torch.equal(one.base.probe(0), alone[0]) and torch.equal(other.base.probe(0), alone[0])
    with other.using(None):
        assert torch.equal(one.base.probe(0), alone[0]) and torch.equal(other.base.probe(0), alone[2])
    for loaded in other.switcher.loaded_adapters:
        other.use(None)
        other.remove(loaded)
    assert torch.equal(one.base.probe(0), alone[0]) and torch.equal(other.base.probe(0), alone[2])


def test_steps_of_two_models_answers_may_alternate(served):
    """Some families note positions on the model between two steps of an answer."""
    path, (adapter, _) = served
    models = [load(adapter, base=str(path), device="cpu"), plain(path)]
    batches = [vlm.prompt_batch(rows(2 - number)) for number, vlm in enumerate(models)]

    def answer(number, step=None):
        def stopping_criteria(ids, scores):
            if step:
                step.wait(60)
            return torch.zeros(len(ids), dtype=torch.bool)

        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        return models[number].model.generate(**batches[number].inputs, **options, stopping_criteria=[stopping_criteria])

    alone = [answer(number) for number in range(2)]
    step, found = threading.Barrier(2), {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: answer(n, step)})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(found[number], alone[number]) for number in range(2))


def test_each_model_has_its_own_registry(served, tmp_path):
    path, adapters = served
    models = []
    for number, adapter in enumerate(adapters):
        registry = AdapterRegistry(tmp_path / f"registry-{number}")
        ref = registry.publish(adapter).ref
        registry.alias(ref.partition("@")[0], "prod", 1)
        models.append(load(f"{ref.partition('@')[0]}@prod", base=str(path), device="cpu", registry=registry))
    assert share(*models)
    answers = [vlm.base.probe(0) for vlm in models]
    assert not torch.equal(*answers)
    with pytest.raises(NotFoundError):
        models[0].use("testing/nobody")


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_weights_are_shared(tiny_fast_vlm, quantization):
    wanted = load_base(str(tiny_fast_vlm), device="cpu", quantization=quantization).probe(0)
    one = plain(tiny_fast_vlm, quantization=quantization)
    before = one.base.probe(0)
    other = plain(tiny_fast_vlm, quantization=quantization)
    assert share(one, other)
    assert torch.equal(before, wanted) and torch.equal(other.base.probe(0), wanted)
    assert torch.equal(one.base.probe(0), wanted) and share(one, plain(tiny_fast_vlm, quantization=quantization))


def test_the_last_one_takes_the_weights_along(own_copy):
    one, other = plain(own_copy), plain(own_copy)
    alive = [weakref.ref(tensor) for tensor in tensors(one)]
    base = one.base
    del one
    gc.collect()
    assert all(ref() is not None for ref in alive) and share(other, plain(own_copy))
    del other
    gc.collect()
    assert all(ref() is not None for ref in alive), "its base alone keeps them"
    del base
    gc.collect()
    assert not any(ref() for ref in alive) and not any(key[0] == str(own_copy) for key in shared_bases._WHOLES)


def test_threads_that_load_at_once_load_once(own_copy, monkeypatch):
    loads, barrier = [], threading.Barrier(4)

    def slowly(*args, **options):
        loads.append(args)
        threading.Event().wait(0.2)
        return load_base(*args, **options)

    monkeypatch.setattr(shared_bases, "load_base", slowly)
    found = []

    def one():
        barrier.wait(60)
        found.append(plain(own_copy))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(loads) == 1 and len(found) == 4 and all(share(found[0], vlm) for vlm in found)


def test_a_folder_is_the_same_by_any_path(own_copy, tmp_path, monkeypatch):
    one = plain(own_copy)
    (tmp_path / "link").symlink_to(own_copy)
    monkeypatch.chdir(tmp_path)
    assert all(share(one, plain(path)) for path in ("base", "./base/", "link"))


@torch.inference_mode()
def test_loading_where_writes_are_not_counted(own_copy):
    one = plain(own_copy)
    assert share(one, plain(own_copy)) and not next(iter(one.model.parameters())).is_inference()


def test_a_load_that_fails_leaves_nothing(own_copy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shared_bases, "load_base", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plain(own_copy)
    assert plain(own_copy).ask(None, "What?") is not None


def test_dtypes_and_quantizations_are_not_shared(own_copy):
    held = [{}, {"dtype": "bfloat16"}, {"quantization": "4bit"}]
    models = [plain(own_copy, **options) for options in held]
    assert [vlm.model.dtype for vlm in models] == [torch.float32, torch.bfloat16, torch.float32]
    assert not {id(tensor) for tensor in tensors(models[0])} & {id(t) for vlm in models[1:] for t in tensors(vlm)}
    assert all(share(vlm, plain(own_copy, **options)) for vlm, options in zip(models, held, strict=True))
    assert share(models[0], load("base", base=str(own_copy), device="cpu:0" if torch.cuda.is_available() else "auto"))


@pytest.mark.parametrize(("configured", "dtype"), [("bfloat16", "bfloat16"), (None, "float32"), ("float32", "float32")])
def test_auto_is_the_dtype_of_the_config(own_copy, configured, dtype):
    edit(own_copy / "config.json", dtype=configured)
    named, auto = plain(own_copy, dtype=dtype), plain(own_copy, dtype="auto")
    assert str(auto.model.dtype) == f"torch.{dtype}" and share(named, auto)


def edit(file, **changes):
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def another_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    save_file(weights | {name: weights[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES = {
    "a weight": another_weight,
    "the config": lambda folder: edit(folder / "config.json", pad_token_id=0),
    "generation": lambda folder: edit(folder / "generation_config.json", repetition_penalty=1.5),
    "the tokenizer": lambda folder: edit(folder / "tokenizer_config.json", model_max_length=77),
    "the template": lambda folder: (folder / "chat_template.jinja").write_text(
        (folder / "chat_template.jinja").read_text() + "{# another #}"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_whose_files_changed_is_another(own_copy, change):
    before = plain(own_copy)
    CHANGES[change](own_copy)
    after = plain(own_copy)
    assert not share(before, after) and before.processor is not after.processor
    assert share(after, plain(own_copy))


def test_files_that_change_while_they_are_read_are_refused(own_copy, monkeypatch):
    def change(*args, **options):
        base = load_base(*args, **options)
        CHANGES["generation"](own_copy)
        return base

    monkeypatch.setattr(shared_bases, "load_base", change)
    with pytest.raises(ModelError, match=f"{own_copy}: the files of the base changed while it was loaded. Load"):
        plain(own_copy)


def add_one(parameter):
    parameter += 1


def replace_data(parameter):
    parameter.data = parameter.data.clone()


def begin_to_train(parameter):
    parameter.requires_grad_(True)


@pytest.mark.parametrize("write", [add_one, replace_data, begin_to_train])
def test_changed_weights_are_not_shared(tiny_fast_vlm, write):
    one = plain(tiny_fast_vlm)
    untouched = one.base.probe(0)
    with torch.no_grad():
        write(next(iter(one.model.parameters())))
    other = plain(tiny_fast_vlm)
    assert not share(one, other) and torch.equal(other.base.probe(0), untouched)
    assert not any(parameter.requires_grad for parameter in other.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype must be auto, or one of float32, bfloat16, float16, got 'float8'"),
        ({"device": "gpu"}, "device must be available on this machine, got 'gpu': Expected one of cpu, cuda"),
        ({"device": "cuda:77"}, "device must be available on this machine, got 'cuda:77': "),
        ({"quantization": "3bit"}, "quantization must be 4bit, 8bit or None, got '3bit'"),
        ({"base": "nowhere"}, "no model at 'nowhere'"),
    ],
)
def test_what_a_base_cannot_be_held_in(tiny_fast_vlm, options, message):
    with pytest.raises(ModelError, match=message):
        load("base", **({"base": str(tiny_fast_vlm), "device": "cpu"} | options))


def test_a_config_with_another_dtype(own_copy):
    edit(own_copy / "config.json", dtype="float64")
    with pytest.raises(ModelError, match="dtype must be auto, or one of .*, got 'float64' in its config"):
        plain(own_copy, dtype="auto")

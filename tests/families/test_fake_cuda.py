"""Every family on a CUDA device that is not there, in bfloat16: a tensor left on the CPU is an error, as on a GPU.

| what runs on fake tensors | families |
|---|---|
| attaching, forward and loss, the base alone, evaluation, optimizer step, greedy answers | all, each with its methods |
| a loaded adapter, alone and in one batch with the base | all that generate text |
| stored features of images in place of the images | all that generate text |

Not covered, because it needs a driver: gradients (autograd asks for the device, so the optimizer step gets ones),
kernels of bitsandbytes and flash-attn, torch.compile, the device's random generator, streams and pinned memory.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from finetune.assemble.batches import Batches
from finetune.assemble.loading import load_base
from finetune.core.batch import Batch, Features
from finetune.errors import FinetuneError
from finetune.methods.adapter import attach, detach
from finetune.serving.batching import answer_rows
from finetune.serving.switcher import Switcher
from finetune.training.find_boundaries import find_boundaries
from finetune.training.optimizer import make_optimizer, optimizer_tensors, set_learning_rate
from finetune.training.replay import Replay, record
from finetune.training.replicated import Replicated
from finetune.training.trainable import GradientCheck, set_train_mode
from tests.fake_cuda import CUDA, FakeCuda
from tests.matrix import METHODS, recipe_of, rows, train_cell
from tests.support import REFUSED
from tests.tiny import FAMILIES

GENERATIVE = [name for name in FAMILIES if name != "clip"]
CHOICES = {"red": "red", "blue": "blue", "it is red": "it is red"}
ROWS = [
    *((family, "lora" if family == "clip" else "lora+prompt+projector") for family in FAMILIES),
    *(("qwen3_vl", method) for method in ("lora", "lora-vision", "lora-projector", "dora", "prompt_tuning", "norms")),
    *(("clip", method) for method in ("lora-vision", "dora")),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family -> the folder of its tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    return {family: save(folder / family) for family, save in FAMILIES.items()}


def examples():
    return [replace(example, choices=CHOICES) for example in rows()]


def on_cuda(folder):
    base = load_base(str(folder), device="cpu", dtype="bfloat16")
    base.model.to(CUDA)
    return base


def pass_through(base, recipe):
    """Attach a method, run what a training run runs on its rows, and return the loss."""
    device, dtype = base.model.device, base.model.dtype
    attachment = attach(base.host, recipe.method)
    batches = Batches(base.collator, attachment.placeholders)
    task = base.task(recipe.task)
    objective = base.objective(task, placeholders=attachment.placeholders)
    batch = batches.training_batch([(example, True) for example in examples()]).to(device, dtype)
    set_train_mode(base.model, attachment)
    (term,) = objective.terms(base.model, batch).values()
    assert term.loss_sum.device == device and term.loss_sum.requires_grad
    assert objective.reference(batch).device == device
    base.model.eval()
    with torch.no_grad():
        validated = objective.terms(base.model, batch)
    prompts = batches.prompt_batch(examples()).to(device, dtype)
    if objective.couples_rows:
        validated = {"choice": objective.choice_loss(base.model, prompts)}
        assert len(task.predict(base.model, prompts)) == len(examples())
    else:
        assert len(task.answer(base.model, prompts, max_new_tokens=[2] * len(examples()))) == len(examples())
    assert {term.loss_sum.device for term in validated.values()} == {device}
    step(attachment, recipe.train)
    return term.loss_sum.item()


def step(attachment, options):
    """Make one optimizer step of gradients that are given: fake tensors have no backward."""
    parameters = attachment.parameters.values()
    optimizer = make_optimizer(attachment, options)
    strategy = Replicated(None)
    strategy.attachment, strategy.optimizer = attachment, optimizer
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    GradientCheck(attachment).check(strategy.gradient, epoch=1)
    norm = strategy.clip(1.0)
    assert norm.item() == pytest.approx(sum(p.numel() for p in parameters) ** 0.5, rel=1e-3)
    set_learning_rate(optimizer, 1e-3)
    optimizer.step()
    kept = optimizer_tensors(optimizer, attachment.parameters)
    assert all(torch.isfinite(tensor.cpu()).all() for slots in kept.values() for tensor in slots.values())
    strategy.load({name: tensor.cpu() for name, tensor in strategy.tensors().items()})


@pytest.mark.parametrize(("family", "method"), ROWS)
def test_a_run_leaves_no_tensor_on_the_cpu(bases, tmp_path, family, method):
    recipe = recipe_of(METHODS[method], bases[family], tmp_path)
    with FakeCuda():
        pass_through(on_cuda(bases[family]), recipe)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_leaves_no_tensor_on_the_cpu(bases, tmp_path, family):
    for method in METHODS:
        try:
            recipe = recipe_of(METHODS[method], bases[family], tmp_path)
            with FakeCuda():
                pass_through(on_cuda(bases[family]), recipe)
        except FinetuneError as error:
            assert (family, method) in REFUSED, error


@pytest.mark.parametrize("family", ["clip", "qwen2_5_vl"])
def test_values_are_those_of_the_cpu(bases, tmp_path, family):
    recipe = recipe_of(METHODS["lora"], bases[family], tmp_path)
    with FakeCuda():
        found = pass_through(on_cuda(bases[family]), recipe)
    expected = pass_through(load_base(str(bases[family]), device="cpu", dtype="bfloat16"), recipe)
    assert found == pytest.approx(expected, rel=2e-3), "attention in bfloat16 rounds otherwise on each device"


@pytest.mark.parametrize(
    ("family", "method"), [*((family, "lora+prompt+projector") for family in GENERATIVE), ("qwen3_vl", "lora")]
)
def test_a_loaded_adapter_leaves_no_tensor_on_the_cpu(bases, tmp_path, monkeypatch, family, method):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU that is not there")
    train_cell(bases[family], METHODS[method], tmp_path, dtype="bfloat16")
    with FakeCuda():
        switcher = Switcher(on_cuda(bases[family]))
        loaded = switcher.add(tmp_path / "adapter")
        assert switcher.can_share(loaded) == (method == "lora")
        answers = answer_rows(switcher, examples(), [loaded, None, loaded, None], max_new_tokens=[2] * 4)
    assert len(answers) == 4


@pytest.mark.parametrize("family", GENERATIVE)
def test_stored_features_leave_no_tensor_on_the_cpu(bases, tmp_path, family):
    kept = examples()
    boundary = boundary_of(bases[family], METHODS["projector"], kept[0], tmp_path)
    with FakeCuda():
        base = on_cuda(bases[family])
        known = {row.id: recorded(base, boundary, row) for row in kept}
        collator = base.collator.reading(lambda rows, *, supervised: [known[row.id] for row in rows])
        Replay(base.model, [boundary])
        batch = collator.training_batch([(row, True) for row in kept]).to(CUDA, base.model.dtype)
        (term,) = base.objective(base.task(base.default_task)).terms(base.model, batch).values()
        assert term.loss_sum.device == CUDA


def boundary_of(base, method, row, folder):
    """The modules whose outputs a run of a method stores, found on the CPU: fake tensors have no graph."""
    base = load_base(str(base), device="cpu", dtype="bfloat16")
    names = [name for name, _ in base.model.named_modules()]
    inputs = base.collator.training_batch([(row, True)]).to("cpu", base.model.dtype).inputs
    attach(base.host, recipe_of(method, base.path, folder).parts)
    try:
        return find_boundaries(base.model, names, inputs, partial(base.family.outputs, base.model)).images
    finally:
        detach(base.model)


def recorded(base, boundary, row):
    step = base.family.image_step(base.processor, base.collator.open(row))
    outputs = record(base.model, boundary, Batch(step.inputs, []).to(CUDA, base.model.dtype).inputs)
    return Features(outputs=outputs, processed=step.processed, replacements=step.replacements)


def test_a_tensor_left_on_the_cpu_is_an_error():
    weight = torch.ones(3, 3)
    with FakeCuda():
        x = torch.ones(2, 3, device="cuda")
        assert (x @ weight.to("cuda")).device == CUDA
        assert (x @ weight.to("cuda")).tolist() == [[3.0] * 3] * 2
        assert torch.tensor([x[0, 0], 2], device="cuda").tolist() == [1, 2]
        assert x[x > 0].device == CUDA and x.cpu().numpy().sum() == 6
        for mixed in (lambda: x @ weight, lambda: torch.cat([x, weight]), lambda: torch.where(weight[:2] > 0, x, x)):
            with pytest.raises(RuntimeError, match="on the same device, but found at least two devices"):
                mixed()
        assert (x * torch.tensor(2.0)).device == CUDA, "a number on the CPU may be used, as on a GPU"

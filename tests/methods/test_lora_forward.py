"""LoRA's folded forward gives PEFT's outputs and gradients, and PEFT's own stands wherever it is not meant."""

import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from finetune.methods import lora_forward
from finetune.methods.lora_forward import fold_additions


class Block(nn.Module):
    def __init__(self, bias, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(12, 7, bias=bias, dtype=dtype).requires_grad_(False)

    def forward(self, x):
        return self.linear(x)


def adapted(*, bias=True, dropout=0.0, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["linear"], **options)
    model = inject_adapter_in_model(config, Block(bias, dtype))
    nn.init.normal_(model.linear.lora_B["default"].weight)
    fold_additions(model.linear)
    return model


@pytest.fixture
def folded(monkeypatch):
    """Count the calls of the folded forward."""
    calls = []
    apply = lora_forward._Linear.apply
    monkeypatch.setattr(lora_forward._Linear, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def gradients(model, x, forward):
    for parameter in model.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    out = forward(x)
    (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
def test_outputs_and_gradients_are_pefts(bias, shape, folded):
    model, x = adapted(bias=bias), torch.randn(*shape)
    ours = gradients(model, x, model)
    assert folded == [1]
    theirs = gradients(model, x, lambda x: type(model.linear).forward(model.linear, x))
    assert len(ours) == len(theirs) == 4 and folded == [1]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_differences():
    layer = adapted().linear.double()
    base, down, up = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, down, up: lora_forward._Linear.apply(x, base.weight, base.bias, down, up, 1.7),
        (x, down, up),
    )


def test_an_input_that_asks_for_no_gradient_gets_none(folded):
    model = adapted()
    model(torch.randn(2, 12)).sum().backward()
    assert folded == [1] and model.linear.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize(
    "case",
    ["no grad", "disabled", "dropout", "dora", "half precision", "another adapter", "none active", "autocast"],
)
def test_pefts_own_forward_stands_elsewhere(case, folded):
    options = {"dropout": {"dropout": 0.5}, "dora": {"use_dora": True}, "half precision": {"dtype": torch.bfloat16}}
    model = adapted(**options.get(case, {}))
    if case == "half precision":
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.data.float()
    if case == "disabled":
        model.linear.enable_adapters(False)
    if case == "another adapter":
        model.linear.set_adapter("other")
    if case == "none active":
        model.linear.set_adapter([])
    x = torch.randn(2, 12, dtype=model.linear.base_layer.weight.dtype)
    with torch.set_grad_enabled(case != "no grad"), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        torch.manual_seed(1)
        out = model(x)
        torch.manual_seed(1)
        assert torch.equal(out, type(model.linear).forward(model.linear, x))
    assert folded == []


def test_dropout_at_rest_is_none(folded):
    model = adapted(dropout=0.5).eval()
    model(torch.randn(2, 12))
    assert folded == [1]


def test_an_empty_batch_passes():
    model = adapted()
    assert model(torch.randn(2, 0, 12)).shape == (2, 0, 7)


def test_a_second_derivative_is_refused():
    model, x = adapted(), torch.randn(2, 12, requires_grad=True)
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_an_adapted_model_pickles():
    model, x = adapted(), torch.randn(2, 12)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))

"""Frozen linear modules by oneDNN: the same outputs and gradients, and torch's own wherever it is not meant."""

import copy

import pytest
import torch
from torch import nn

from finetune.core import matmul

has_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def calls(monkeypatch):
    """Count products by oneDNN, on a machine that takes it to be faster."""
    count = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(matmul, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: count.append(1) or real(*args))
    return count


def frozen(*, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Linear(12, 7, bias=bias, dtype=dtype).requires_grad_(False)
    matmul.speed_up([module])
    return module


def run(module, x, forward):
    x = x.clone().requires_grad_()
    out = forward(module, x)
    (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()
    return out.detach(), x.grad


@has_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 12), (3, 9, 12)])
def test_outputs_and_gradients_are_torchs(bias, shape, calls):
    module, x = frozen(bias=bias), torch.randn(*shape)
    ours = run(module, x, lambda module, x: module(x))
    assert len(calls) == 2
    for one, other in zip(ours, run(module, x, nn.Linear.forward), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(module(x), ours[0])
    assert len(calls) == 3


@has_onednn
def test_a_row_comes_out_the_same_whatever_others_stand_beside_it():
    x, weight = torch.randn(784, 192), torch.randn(512, 192)
    whole = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    # Elsewhere oneDNN is never called by the package, and may add few rows in another order than many.
    off = 0 if matmul.onednn_is_faster() else 1e-5
    for rows in (16, 17, 100):
        few = torch.ops.mkldnn._linear_pointwise(x[:rows], weight, None, "none", [], "")
        assert torch.allclose(few, whole[:rows], rtol=0, atol=off * whole.abs().max().item())


@has_onednn
def test_torchs_own_stands_where_it_is_not_meant(calls):
    assert frozen()(torch.randn(1, 12)).shape == (1, 7)
    assert frozen(dtype=torch.bfloat16)(torch.randn(32, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    trained = frozen().requires_grad_(True)
    trained(torch.randn(32, 12)).sum().backward()
    assert trained.weight.grad is not None and trained.bias.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen()(torch.randn(32, 12)).dtype == torch.bfloat16
    assert frozen()(torch.randn(0, 12)).shape == (0, 7)
    assert not calls


FOLLOWED = {
    "gradient of a gradient": lambda f, x: torch.autograd.functional.hvp(lambda x: f(x).pow(3).sum(), x, x)[1],
    "forward mode": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "functional": lambda f, x: torch.func.grad(lambda x: f(x).pow(2).sum())(x),
    "of each image": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x.expand(3, -1, -1)),
    "traced": lambda f, x: torch.jit.trace(f, x[:20])(x),
    "compiled": lambda f, x: torch.compile(f, backend="eager", fullgraph=True)(x.clone().requires_grad_()).detach(),
}


@has_onednn
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize("how", FOLLOWED)
def test_however_a_model_is_followed_it_is_torchs(how, calls):
    module, x = frozen(), torch.randn(32, 12)
    plain = nn.Linear(12, 7).requires_grad_(False)
    plain.load_state_dict(module.state_dict())
    assert torch.allclose(FOLLOWED[how](module, x), FOLLOWED[how](plain, x), rtol=1e-4, atol=1e-5)


@has_onednn
def test_a_copy_is_of_its_own_weight(calls):
    module = frozen()
    other = copy.deepcopy(module)
    other.weight.zero_()
    x = torch.randn(32, 12)
    assert torch.equal(other(x), other.bias.expand(32, 7)) and not torch.equal(module(x), other(x))


@pytest.mark.parametrize(
    ("capability", "vendor", "faster"),
    [
        ("AVX512", "vendor_id : AuthenticAMD", True),
        ("AVX512", "vendor_id : GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
    ],
)
def test_it_is_for_amds_with_avx512(monkeypatch, capability, vendor, faster):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(matmul, "_vendor", lambda: vendor)
    assert matmul.onednn_is_faster() is faster


def test_elsewhere_a_model_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(matmul, "ONEDNN_IS_FASTER", False)
    module = frozen()
    assert "forward" not in vars(module)
    rows = torch.randn(32, 12)
    assert torch.equal(matmul.linear(rows, module.weight, module.bias), module(rows))

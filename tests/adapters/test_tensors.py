"""Tensors are views of one copy of the file: equal to what was saved, aligned, and finite."""

import pytest
import torch
from safetensors.torch import load

from finetune.adapters.folder import check_header, tensor_table, weights_bytes
from finetune.adapters.tensors import tensors_of
from finetune.errors import IntegrityError

MIXED = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7),
    "c": torch.randn(2, 3).half(),
    "d": torch.randn(16, 4),
    "e": torch.randn(3).bfloat16(),
    "f": torch.randn(1),
}


def read(tensors):
    data, table = weights_bytes(tensors), tensor_table(tensors)
    return tensors_of(data, table, check_header(data, table, source="x"), source="x", device="cpu"), data


def test_every_tensor_is_what_safetensors_reads():
    found, data = read(MIXED)
    assert found.keys() == load(data).keys()
    for name, tensor in load(data).items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert found[name].data_ptr() % 64 == 0 and found[name].is_contiguous()


def test_tensors_that_lie_well_share_one_buffer():
    found, _ = read({f"t{i}": torch.randn(4, 16) for i in range(8)})
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", list(MIXED))
def test_a_value_that_is_not_finite_is_found_wherever_it_is(name, value):
    bad = MIXED[name].clone()
    bad.view(-1)[-1] = value
    with pytest.raises(IntegrityError, match=f"x: the values of tensor {name} must be finite, got NaN or infinity"):
        read(MIXED | {name: bad})


def test_infinities_that_cancel_are_found_and_large_values_are_not_mistaken():
    with pytest.raises(IntegrityError, match="x: the values of tensor a must be finite"):
        read({"a": torch.tensor([float("inf"), -float("inf")])})
    large = {"a": torch.full((64,), 3e38), "b": torch.full((64,), 6e4).half()}
    found, _ = read(large)
    assert torch.equal(found["a"], large["a"])

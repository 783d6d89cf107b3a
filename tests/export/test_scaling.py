"""Scaling that is baked into B: the same products in any order of multiplication."""

import math

import pytest
import torch

from finetune.export.scaling import bake_scaling


def lora(*, rslora=False):
    """Two modules, 3 to 5 and 5 to 2, of ranks 2 and 4 and alphas 8 and 6."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.q": ((2, 3), (5, 2)), "b.c.v": ((4, 5), (2, 4))}
    tensors = {
        f"base_model.model.{module}.lora_{kind}.weight": torch.randn(shape, generator=generator)
        for module, pair in shapes.items()
        for kind, shape in zip("AB", pair, strict=True)
    }
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 8,
        "use_rslora": rslora,
        "rank_pattern": {"b.c.v": 4},
        "alpha_pattern": {"b.c.v": 6},
    }
    return tensors, config


@pytest.mark.parametrize(("rslora", "scalings"), [(False, (4, 1.5)), (True, (8 / math.sqrt(2), 3))])
def test_every_product_is_what_it_was_scaled(rslora, scalings):
    tensors, config = lora(rslora=rslora)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    baked, baked_config = bake_scaling(tensors, config)
    assert baked_config == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    for module, scaling in zip(("a.q", "b.c.v"), scalings, strict=True):
        down, up = (f"base_model.model.{module}.lora_{kind}.weight" for kind in "AB")
        assert baked[down].shape[0] == baked[up].shape[1] == 4 and baked[up].is_contiguous()
        assert torch.allclose(baked[up] @ baked[down], tensors[up] @ tensors[down] * scaling, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept), "what was given stays"


def test_what_is_no_lora_matrix_is_kept_and_half_precision_is_not_rounded_again():
    tensors, config = lora()
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    magnitude = "base_model.model.a.q.lora_magnitude_vector"
    tensors[magnitude] = torch.ones(5)
    baked, _ = bake_scaling(tensors, {**config, "lora_alpha": 3})
    assert baked[magnitude] is tensors[magnitude]
    up = "base_model.model.a.q.lora_B.weight"
    assert baked[up].dtype == torch.float32 and torch.equal(baked[up][:, :2], tensors[up].float() * 1.5)
    assert not baked[up][:, 2:].any()

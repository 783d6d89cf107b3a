"""How attention is computed: what the recipe asks for, wherever a tower can, or one clear error."""

import pytest

from finetune.assemble.loading import base_of, load_base
from finetune.errors import ModelError, RecipeError
from tests.tiny import save_idefics3


def implementations(model):
    config = model.config
    return config.get_text_config()._attn_implementation, config.vision_config._attn_implementation


@pytest.mark.parametrize("wanted", ["eager", "sdpa"])
def test_a_recipe_chooses_and_the_outputs_agree(make_recipe, tmp_path, wanted):
    folder = save_idefics3(tmp_path / "base")
    base = base_of(make_recipe(folder, model={"attn_implementation": wanted}))
    assert implementations(base.model) == (wanted, wanted)
    plain = load_base(str(folder), device="cpu")
    found, known = base.probe(0), plain.probe(0)
    assert (found - known).abs().max() <= 1e-4 * known.abs().max(), "other sums, of which each CPU has its own order"


def test_a_tower_that_cannot_keeps_what_it_can(tiny_fast_vlm):
    """FastVLM's vision tower is convolutional: it declares no sdpa."""
    base = load_base(str(tiny_fast_vlm), device="cpu", attn_implementation="sdpa")
    assert implementations(base.model)[0] == "sdpa"


def test_what_is_not_available_is_refused(tiny_fast_vlm, make_recipe):
    with pytest.raises(
        ModelError, match="flash_attention_2 needs the package flash-attn and a CUDA device, got device cpu"
    ):
        load_base(str(tiny_fast_vlm), device="cpu", dtype="bfloat16", attn_implementation="flash_attention_2")
    with pytest.raises(RecipeError, match="flash_attention_2 needs 16 bit, got dtype float32. Set dtype: bfloat16"):
        make_recipe(tiny_fast_vlm, model={"attn_implementation": "flash_attention_2"})


def test_a_language_tower_that_cannot_is_refused(tiny_fast_vlm, monkeypatch):
    from transformers import Qwen2Model

    monkeypatch.setattr(Qwen2Model, "_supports_sdpa", False)
    with pytest.raises(
        ModelError, match="model.attn_implementation must be one that the model supports, got sdpa: .*Set auto"
    ):
        load_base(str(tiny_fast_vlm), device="cpu", attn_implementation="sdpa")

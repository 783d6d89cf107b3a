"""llama.cpp's names, its order of rows, and its file of a LoRA, against what its own sources do."""

import gguf
import pytest
import torch
from transformers import (
    CohereConfig,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    PaliGemmaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from finetune.errors import ExportError
from finetune.export.llama_cpp import LoraFile, language_of, read_lora, rounded, write_lora

TOWERS = {"language": ("model.language_model",)}
HEADS, GROUPS, WIDTH = 6, 2, 8  # of queries, of keys, and values in each


def language(text_config):
    return language_of(LlavaConfig(text_config=text_config), TOWERS)


LLAMA = LlamaConfig(
    hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_key_value_heads=GROUPS, num_hidden_layers=3
)


def interleaved(rows, heads):
    """Row by row what llama.cpp's converter does to q and k: row i of a head, then row i of its second half."""
    width = len(rows) // heads
    order = [h * width + half * width // 2 + i for h in range(heads) for i in range(width // 2) for half in (0, 1)]
    return rows[order]


@pytest.mark.parametrize(("leaf", "heads"), [("q_proj", HEADS), ("k_proj", GROUPS)])
def test_a_permuted_sum_is_the_sum_of_the_permuted(leaf, heads):
    module = f"model.language_model.layers.0.self_attn.{leaf}"
    base, down, up = torch.randn(heads * WIDTH, 10), torch.randn(4, 10), torch.randn(heads * WIDTH, 4)
    llama = language(LLAMA)
    merged = interleaved(base + up @ down, heads)
    torch.testing.assert_close(interleaved(base, heads) + llama.to_llama_cpp(module, up) @ down, merged)
    assert torch.equal(llama.to_llama_cpp(module, base), interleaved(base, heads))
    assert torch.equal(llama.from_llama_cpp(module, llama.to_llama_cpp(module, base)), base)
    assert not torch.equal(llama.to_llama_cpp(module, base), base)


@pytest.mark.parametrize("leaf", ["v_proj", "o_proj"])
def test_what_is_not_turned_stays(leaf):
    rows = torch.randn(HEADS * WIDTH, 4)
    assert torch.equal(language(LLAMA).to_llama_cpp(f"x.layers.0.self_attn.{leaf}", rows), rows)
    assert torch.equal(language(Qwen2Config()).to_llama_cpp("x.layers.0.self_attn.q_proj", rows), rows)


def test_attention_in_llama_cpps_order_is_that_of_transformers():
    """llama.cpp turns neighbouring values of a head (GGML_ROPE_TYPE_NORMAL), transformers its two halves."""
    llama, hidden, tokens = language(LLAMA), torch.randn(5, 16), 5
    weights = {"q_proj": torch.randn(HEADS * WIDTH, 16), "k_proj": torch.randn(GROUPS * WIDTH, 16)}
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)  # [T, D / 2]

    def heads(weight):
        return (hidden @ weight.T).unflatten(1, (-1, WIDTH)).transpose(0, 1)  # [heads, T, D]

    def scores(q, k):
        return q @ k.repeat_interleave(HEADS // GROUPS, dim=0).mT

    def turned(x):
        first, second = x[..., 0::2], x[..., 1::2]
        pairs = (first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos())
        return torch.stack(pairs, dim=-1).flatten(-2)

    halves = torch.cat([angles, angles], dim=-1)[None]
    q, k = apply_rotary_pos_emb(*(heads(weights[leaf])[None] for leaf in weights), halves.cos(), halves.sin())
    there = [turned(heads(llama.to_llama_cpp(f"layers.0.self_attn.{leaf}", weights[leaf]))) for leaf in weights]
    torch.testing.assert_close(scores(*there), scores(q[0], k[0]), rtol=1e-4, atol=1e-4)
    unturned = [turned(heads(weights[leaf])) for leaf in weights]
    assert not torch.allclose(scores(*unturned), scores(q[0], k[0]), atol=1)


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text_config", "architecture"),
    [(LlamaConfig(), "llama"), (Qwen2Config(), "qwen2"), (Qwen3Config(), "qwen3")],
    ids=["llama", "qwen2", "qwen3"],
)
def test_names(text_config, architecture):
    known = language(text_config)
    assert known.architecture == architecture
    for module, name in NAMES.items():
        assert known.weight_name(f"model.language_model.layers.2.{module}") == f"blk.2.{name}.weight"


@pytest.mark.parametrize(
    "module",
    ["lm_head.decoder", "model.language_model.layers.99.mlp.up_proj", "model.language_model.layers.0.self_attn.mixer"],
)
def test_a_module_that_llama_cpp_has_not_is_named(module):
    with pytest.raises(ExportError, match=f"{module}: llama.cpp's architecture 'llama' has no weight for this module"):
        language(LLAMA).weight_name(module)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LlavaConfig(text_config=CohereConfig()),
            "its language model must be one of gemma3_text, .*, got 'cohere'",
        ),
        (
            PaliGemmaConfig(),
            "a paligemma base cannot be written as GGUF: llama.cpp has no bidirectional attention",
        ),
        (Mistral3Config(), "reads its language model as one of two architectures, depending on its release"),
    ],
    ids=["cohere", "paligemma", "mistral3"],
)
def test_language_models_that_are_not_known_are_refused(config, message):
    with pytest.raises(ExportError, match=message):
        language_of(config, TOWERS)


def lora(**changes):
    pairs = {"blk.0.attn_q.weight": (torch.randn(4, 16), torch.randn(8, 4))}
    return LoraFile(**{"architecture": "llama", "alpha": 4.0, "pairs": pairs, **changes})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_holds_what_was_written(tmp_path, dtype):
    wanted = lora()
    write_lora(
        tmp_path / "a.gguf", wanted, dtype=dtype, about={"general.name": "ns/näme", "general.base_model.count": 1}
    )
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    meta = {name: fields[name].contents() for name in fields}
    assert meta["general.type"] == "adapter" and meta["adapter.type"] == "lora" and meta["adapter.lora.alpha"] == 4.0
    assert meta["general.architecture"] == "llama" and meta["general.file_type"] == (1 if dtype == "float16" else 0)
    assert meta["general.name"] == "ns/näme" and meta["general.base_model.count"] == 1
    held = read_lora(tmp_path / "a.gguf")
    assert (held.architecture, held.alpha, held.pairs.keys()) == ("llama", 4.0, wanted.pairs.keys())
    for got, tensor in zip(held.pairs["blk.0.attn_q.weight"], wanted.pairs["blk.0.attn_q.weight"], strict=True):
        assert torch.equal(got, tensor.to(getattr(torch, dtype)))


def test_a_value_that_half_precision_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"blk.0.lora_b: a value of 1e\+05 is too large for float16"):
        rounded(torch.tensor([-1e5, 1.0]), "float16", name="blk.0.lora_b")


def write_raw(path, tensors, *, kind="adapter", adapter="lora"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", adapter)
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name, shape in tensors.items():
        writer.add_tensor(name, torch.zeros(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GOOD = {"x.weight.lora_a": (4, 16), "x.weight.lora_b": (8, 4)}


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (GOOD, {"kind": "model"}, "general.type must be 'adapter' for llama.cpp, got 'model'"),
        (GOOD, {"adapter": "dora"}, "adapter.type must be 'lora' for llama.cpp, got 'dora'"),
        ({"x.weight.lora_a": (4, 16)}, {}, "one .lora_a and one .lora_b, but x.weight.lora_b is missing"),
        ({**GOOD, "x.bias": (8,)}, {}, "one .lora_a and one .lora_b, but x.bias"),
        ({**GOOD, "x.weight.lora_b": (4, 8)}, {}, r"must have A \[r, I\] and B \[O, r\], got \[4, 16\] and \[4, 8\]"),
    ],
    ids=["model", "dora", "lone", "bias", "transposed"],
)
def test_a_file_that_llama_cpp_would_not_take_is_refused(tmp_path, tensors, changes, message):
    write_raw(tmp_path / "a.gguf", tensors, **changes)
    with pytest.raises(ExportError, match=message):
        read_lora(tmp_path / "a.gguf")

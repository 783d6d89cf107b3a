"""The language model of a tiny base as a GGUF file, so that llama.cpp itself can be given an adapter for it."""

import json
from pathlib import Path

import gguf
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from finetune.assemble.base import Base
from finetune.export.llama_cpp import language_of
from tests.tiny import FAMILIES
from tests.tiny.parts import save

# What llama.cpp takes for given: Gemma 3 attends to everything in each sixth layer alone, and scales by its head.
GEMMA3 = {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 16}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def save_tiny(family: str, folder: Path, **text_config: object) -> Path:
    """The folder of a tiny base, its language model of another geometry where fields are given."""
    FAMILIES[family](folder)
    if text_config:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= text_config
        (folder / "config.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        save(model, AutoProcessor.from_pretrained(folder), folder)
    return folder


def write_base(base: Base, path: Path) -> None:
    """Write the language model of ``base`` with the fields that llama.cpp wants of its architecture."""
    language, config = language_of(base.model.config, base.towers), base.model.config.get_text_config()
    writer = gguf.GGUFWriter(path, language.architecture)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base((rope if "rope_theta" in rope else rope["sliding_attention"])["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    if language.architecture == "qwen3vl":
        writer.add_num_deepstack_layers(1)
    if language.architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    _add_tokens(writer, config.vocab_size)
    _add_weights(writer, base, language)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokens(writer: gguf.GGUFWriter, count: int) -> None:
    """Ids are what is asked with, so that any texts will do."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(count)])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def _add_weights(writer: gguf.GGUFWriter, base: Base, language) -> None:
    (path,) = base.towers["language"]
    tower, output = base.model.get_submodule(path), base.model.get_output_embeddings().weight
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == language.architecture)
    names = gguf.get_tensor_name_map(architecture, language.num_layers)
    for name, parameter in tower.named_parameters():
        module, _, leaf = name.rpartition(".")
        tensor = language.to_llama_cpp(module, parameter.detach())
        if language.architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1  # llama.cpp's norm multiplies by the weight, transformers' by 1 more
        writer.add_tensor(f"{names.get_name(f'model.{module}')}.{leaf}", tensor.contiguous().numpy())
    if output is not tower.get_input_embeddings().weight:
        writer.add_tensor("output.weight", output.detach().numpy())

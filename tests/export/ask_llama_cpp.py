"""Asks llama.cpp for the log probabilities of the next token; run by a Python that has xllamacpp and nothing of ours.

python ask_llama_cpp.py BASE.gguf ADAPTER.gguf TOKENS VOCABULARY    (ADAPTER may be `-`, TOKENS are ids with commas)
"""

import json
import sys

import xllamacpp as llama_cpp


def main(base: str, adapter: str, tokens: str, vocabulary: str) -> None:
    """Print them as JSON, by id."""
    params = llama_cpp.CommonParams()
    params.model.path = base
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cpuparams.n_threads = 256, 1, 0, 1
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter != "-":
        params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = llama_cpp.Server(params)
    answer = server.handle_completions({
        "prompt": [int(token) for token in tokens.split(",")],
        "n_predict": 1,
        "n_probs": int(vocabulary),
        # The probabilities are those before sampling; of an end of the answer none would be told.
        "logit_bias": [[40, 1000.0]],
    })  # fmt: skip
    (token,) = answer["choices"][0]["logprobs"]["content"]
    print("ANSWER", json.dumps({entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])

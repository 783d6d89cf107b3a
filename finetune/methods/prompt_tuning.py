"""Prompt tuning: trained embeddings before a row's first token (Lester et al., https://arxiv.org/abs/2104.08691).

A row holds placeholder ids where the prompt goes, and the input embedding has what they look up replaced. So the model
builds positions and masks from ids as it always does, which a prompt put before ``inputs_embeds`` would break for
multimodal rotary positions, for images seen in both directions, and under left padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.core.batch import Placeholders
from finetune.errors import ManifestError, MethodError, brief
from finetune.interfaces import Part
from finetune.methods.prompt_rows import CHILD, FrameUpdate, PromptUpdate, TrainedPrompt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.adapters.manifest import PartDescription
    from finetune.interfaces import Host, Towers, Update
    from finetune.recipe import PromptTuningSection

TENSOR = "prompt_embeddings"  # PEFT's name for it in a saved file


class PromptTuning:
    """A prompt of ``num_virtual_tokens`` embeddings; rows must hold its placeholders."""

    def attach(self, host: Host, options: PromptTuningSection) -> Part:
        """Add a fresh prompt, made of the embeddings of a text or of random tokens.

        Raises:
            MethodError: the initial text holds no token, or the model has no one sequence of tokens.
        """
        self.check(host.model, host.towers, options)
        embedding = _input_embedding(host.model)
        ids = _initial_ids(options, host.tokenizer, embedding.weight.shape[0])
        with torch.no_grad():
            start = embedding(ids.to(embedding.weight.device)[None])[0].float()  # [N, D], after any embedding scale
        places = Placeholders(options.num_virtual_tokens, _placeholder_id(host.model, host.tokenizer))
        parameter = nn.Parameter(start.clone())
        TrainedPrompt(host.model, embedding, parameter, places)
        return Part(
            method="prompt_tuning",
            options={
                "num_virtual_tokens": places.num_virtual_tokens,
                "token_dim": start.shape[1],
                "placeholder_token_id": places.token_id,
            },
            modules={},
            parameters={TENSOR: parameter},
            alive_after={TENSOR: 1},
            learning_rates={TENSOR: options.lr_ratio} if options.lr_ratio != 1 else {},
            placeholders=places,
        )

    def check(self, model: PreTrainedModel, towers: Towers, options: PromptTuningSection) -> None:
        """Raise MethodError where the model has no one sequence of tokens."""
        if _input_embedding(model) is None:
            raise MethodError(f"{type(model).__name__} has no one sequence of tokens that a prompt could begin")

    def detach(self, model: PreTrainedModel) -> None:
        """Remove the prompt and its hooks."""
        if (trained := _trained(model)) is not None:
            trained.leave()

    def is_attached(self, model: PreTrainedModel) -> bool:
        """Return whether a prompt trains here."""
        return _trained(model) is not None

    def switch(self, model: PreTrainedModel, on: bool) -> None:
        """Have the prompt fill the placeholders, or leave them."""
        if (trained := _trained(model)) is not None:
            trained.on = on

    def expected_tensors(
        self, model: PreTrainedModel, towers: Towers, description: PartDescription
    ) -> dict[str, tuple[int, ...]]:
        """Return the one tensor's shape.

        Raises:
            ManifestError: the options do not fit this base's embedding.
        """
        places = placeholders_of(description.options)
        if description.modules:
            raise ManifestError("a tuned prompt changes no modules, but this one names some")
        embedding = _input_embedding(model)
        if embedding is None:
            raise ManifestError(f"{type(model).__name__} has no one sequence of tokens that a prompt could begin")
        rows, width = embedding.weight.shape
        if description.options["token_dim"] != width or places.token_id >= rows:
            raise ManifestError(
                f"the prompt is for embeddings of {brief(description.options['token_dim'])} values and token id "
                f"{brief(places.token_id)}; this base has {rows} embeddings of {width}"
            )
        if places.token_id in _ids_with_a_meaning(model):
            raise ManifestError(f"token id {places.token_id} has a meaning for this base: no prompt can stand there")
        return {TENSOR: (places.num_virtual_tokens, width)}

    def updates(
        self, model: PreTrainedModel, description: PartDescription, tensors: Mapping[str, Tensor]
    ) -> dict[str, Update]:
        """Return the updates of the input embedding and of the whole model for a finished prompt."""
        embedding: Any = model.get_input_embeddings()
        prompt = tensors[TENSOR].to(embedding.weight.device, torch.float32)
        path = next(name for name, module in model.named_modules() if module is embedding)
        places = placeholders_of(description.options)
        return {"": FrameUpdate(model), path: PromptUpdate(embedding, prompt, places)}


def placeholders_of(options: Mapping[str, Any]) -> Placeholders:
    """Return the places that a saved prompt fills.

    Raises:
        ManifestError: the options are not those of a prompt.
    """
    names = {"num_virtual_tokens", "token_dim", "placeholder_token_id"}
    if set(options) != names or not all(type(value) is int and value >= 0 for value in options.values()):
        raise ManifestError(
            f"the options of a tuned prompt are the numbers {', '.join(sorted(names))}, not {brief(options, 200)}"
        )
    if not 1 <= options["num_virtual_tokens"] <= 1024:
        raise ManifestError(f"num_virtual_tokens {brief(options['num_virtual_tokens'])} is not between 1 and 1024")
    return Placeholders(options["num_virtual_tokens"], options["placeholder_token_id"])


def _trained(model: PreTrainedModel) -> TrainedPrompt | None:
    embedding = _input_embedding(model)
    return None if embedding is None else embedding._modules.get(CHILD)


def _input_embedding(model: PreTrainedModel) -> Any:
    """Return the module that looks up tokens; None for a dual encoder, whose towers each have inputs of their own."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _initial_ids(options: PromptTuningSection, tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> Tensor:
    """Return [N] token ids: a text's, repeated or cut to fit, or random ones."""
    wanted = options.num_virtual_tokens
    if options.prompt_tuning_init_text is None:
        return torch.randint(0, min(len(tokenizer), num_embeddings), (wanted,))
    ids = tokenizer(options.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise MethodError("method.prompt_tuning_init_text holds no token. Give a text, or leave it out.")
    return torch.tensor((ids * -(-wanted // len(ids)))[:wanted])


def _ids_with_a_meaning(model: PreTrainedModel) -> set[int]:
    """Return the ids that fill up rows, or stand for something that is no text."""
    kinds = ("image", "video", "vision", "audio", "boi", "eoi")
    config = model.config.to_dict()
    found = {v for k, v in config.items() if k.startswith(kinds) and k.endswith(("token_id", "token_index"))}
    return {value for value in found | {model.generation_config.pad_token_id} if isinstance(value, int)}


def _placeholder_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a legal id that no text encodes to, where there is one; else one that ends or begins a text."""
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    if rows > len(tokenizer):
        return rows - 1
    for token_id in (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None and token_id != tokenizer.pad_token_id:
            return int(token_id)
    raise MethodError("no token could stand where the prompt goes: unk, bos and eos are missing or the same as pad")

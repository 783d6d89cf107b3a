"""Prompt tuning: trained embeddings before a row's first token (Lester et al., https://arxiv.org/abs/2104.08691).

A row begins with placeholder ids, and a hook on the input embedding replaces their embeddings with the prompt. So the
model builds positions and masks from ids as usual. A prompt before ``inputs_embeds`` would break this for multimodal
rotary positions, for bidirectional attention on images, and under left padding.
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
        """Add a fresh prompt from the embeddings of a text or of random tokens.

        Raises:
            MethodError: the initial text holds no token, or the model has no single input embedding.
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
        """Raise MethodError if the model has no single input embedding."""
        if _input_embedding(model) is None:
            raise MethodError(f"{_no_embedding(model)} Choose another method.")

    def detach(self, model: PreTrainedModel) -> None:
        """Remove the prompt and its hooks."""
        if (trained := _trained(model)) is not None:
            trained.leave()

    def is_attached(self, model: PreTrainedModel) -> bool:
        """Return whether a prompt trains in the model."""
        return _trained(model) is not None

    def switch(self, model: PreTrainedModel, on: bool) -> None:
        """Switch the prompt on, or off to keep the embeddings of the placeholders."""
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
            raise ManifestError(f"a tuned prompt must list no modules, got {brief(description.modules)}")
        embedding = _input_embedding(model)
        if embedding is None:
            raise ManifestError(f"{_no_embedding(model)} Load the base of the training.")
        rows, width = embedding.weight.shape
        if description.options["token_dim"] != width or places.token_id >= rows:
            raise ManifestError(
                f"the prompt must fit the {rows} embeddings of {width} values of this base, got token_dim "
                f"{brief(description.options['token_dim'])} and placeholder_token_id {brief(places.token_id)}"
            )
        if places.token_id in _ids_with_a_meaning(model):
            raise ManifestError(
                f"placeholder_token_id must have no special meaning for this base, got {places.token_id}"
            )
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
    """Return the placeholders of a saved prompt.

    Raises:
        ManifestError: the options are not those of a prompt.
    """
    names = {"num_virtual_tokens", "token_dim", "placeholder_token_id"}
    if set(options) != names or not all(type(value) is int and value >= 0 for value in options.values()):
        raise ManifestError(
            f"the options of a tuned prompt must be the numbers {', '.join(sorted(names))}, got {brief(options, 200)}"
        )
    if not 1 <= options["num_virtual_tokens"] <= 1024:
        raise ManifestError(f"num_virtual_tokens must be from 1 to 1024, got {brief(options['num_virtual_tokens'])}")
    return Placeholders(options["num_virtual_tokens"], options["placeholder_token_id"])


def _trained(model: PreTrainedModel) -> TrainedPrompt | None:
    embedding = _input_embedding(model)
    return None if embedding is None else embedding._modules.get(CHILD)


def _no_embedding(model: PreTrainedModel) -> str:
    """Return the message for a model without a single input embedding."""
    return f"prompt tuning needs a model with one input embedding for all tokens, and {type(model).__name__} has none."


def _input_embedding(model: PreTrainedModel) -> Any:
    """Return the module that embeds tokens; None for a dual encoder, whose towers have separate inputs."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _initial_ids(options: PromptTuningSection, tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> Tensor:
    """Return [N] token ids: those of a text, repeated or cut to fit, or random ones."""
    wanted = options.num_virtual_tokens
    if options.prompt_tuning_init_text is None:
        return torch.randint(0, min(len(tokenizer), num_embeddings), (wanted,))
    ids = tokenizer(options.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise MethodError(
            "method.prompt_tuning_init_text must hold at least one token, got "
            f"{brief(options.prompt_tuning_init_text)}. Give another text, or leave it out."
        )
    return torch.tensor((ids * -(-wanted // len(ids)))[:wanted])


def _ids_with_a_meaning(model: PreTrainedModel) -> set[int]:
    """Return the ids of padding, and of tokens that stand for images or other media."""
    kinds = ("image", "video", "vision", "audio", "boi", "eoi")
    config = model.config.to_dict()
    found = {v for k, v in config.items() if k.startswith(kinds) and k.endswith(("token_id", "token_index"))}
    return {value for value in found | {model.generation_config.pad_token_id} if isinstance(value, int)}


def _placeholder_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a valid id that no text encodes to, if there is one; else one that begins or ends a text."""
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    if rows > len(tokenizer):
        return rows - 1
    for token_id in (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None and token_id != tokenizer.pad_token_id:
            return int(token_id)
    raise MethodError(
        "prompt tuning needs a token id for its placeholders, but unk, bos and eos of the tokenizer are missing or the "
        "same as pad. Choose another method."
    )

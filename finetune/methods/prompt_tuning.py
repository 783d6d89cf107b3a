"""Prompt tuning: trained embeddings before a row's first token (Lester et al., https://arxiv.org/abs/2104.08691).

A row holds placeholder ids where the prompt goes, and a hook on the input embedding replaces what they look up. So the
model builds positions and masks from ids as it always does, which a prompt put before ``inputs_embeds`` would break for
multimodal rotary positions, for pictures seen in both directions, and under left padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.batch import Placeholders
from finetune.errors import AdapterError, ManifestError, MethodError, brief
from finetune.interfaces import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.adapters.manifest import PartDescription
    from finetune.interfaces import Host, Towers
    from finetune.recipe import PromptTuningSection

TENSOR = "prompt_embeddings"  # PEFT's name for it in a saved file
_CHILD = "tuned_prompts"


class PromptTuning:
    """A prompt of ``num_virtual_tokens`` embeddings; rows must hold its placeholders."""

    def attach(self, host: Host, adapter_name: str, options: PromptTuningSection) -> Part:
        """Adds a fresh prompt, made of the embeddings of a text or of random tokens.

        Raises:
            MethodError: the initial text holds no token, or the model has no one sequence of tokens.
        """
        embedding = _input_embedding(host.model)
        if embedding is None:
            raise MethodError(f"{type(host.model).__name__} has no one sequence of tokens that a prompt could begin")
        ids = _initial_ids(options, host.tokenizer, embedding.weight.shape[0])
        with torch.no_grad():
            start = embedding(ids.to(embedding.weight.device)[None])[0].float()  # [N, D], after any embedding scale
        places = Placeholders(options.num_virtual_tokens, _placeholder_id(host.model, host.tokenizer))
        parameter = nn.Parameter(start.clone())
        _table(host.model, create=True).add(adapter_name, parameter, places)
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

    def attach_saved(
        self, model: PreTrainedModel, adapter_name: str, description: PartDescription, tensors: Mapping[str, Tensor]
    ) -> None:
        """Adds a finished prompt."""
        embedding: Any = model.get_input_embeddings()
        start = tensors[TENSOR].to(embedding.weight.device, torch.float32)
        parameter = nn.Parameter(start, requires_grad=False)
        _table(model, create=True).add(adapter_name, parameter, placeholders_of(description.options))

    def expected_tensors(
        self, model: PreTrainedModel, towers: Towers, description: PartDescription
    ) -> dict[str, tuple[int, ...]]:
        """Returns the one tensor's shape.

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

    def detach(self, model: PreTrainedModel, adapter_name: str) -> None:
        """Removes a prompt; the last one takes the hooks with it."""
        table = _table(model)
        if table is not None:
            table.remove(adapter_name)

    def merge(self, model: PreTrainedModel, adapter_name: str) -> None:
        """Refuses: a prompt stands in the rows, no weight can hold it."""
        if (table := _table(model)) is not None and adapter_name in table.prompts:
            raise MethodError("a tuned prompt cannot be merged: it stands in the rows, not in the weights")

    def switch(self, model: PreTrainedModel) -> Callable[[str | None], None] | None:
        """Returns what makes one prompt, or none, fill the placeholders."""
        table = _table(model)
        return None if table is None else table.use


def placeholders_of(options: Mapping[str, Any]) -> Placeholders:
    """Returns the places that a saved prompt fills.

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


class PromptTable(nn.Module):
    """The prompts of one model, kept below its input embedding, and the hooks that put one of them into the rows."""

    def __init__(self, model: PreTrainedModel, embedding: nn.Module):
        super().__init__()
        self.prompts = nn.ParameterDict()
        self.places: dict[str, Placeholders] = {}
        self.active: str | None = None
        self._begins = True  # whether the forward that runs reads its rows from the first token on
        self._mask: Any = None  # the attention mask of that forward
        self._embedding = [embedding]  # in a list, so that it does not become a child of its own child
        self._handles = [
            model.register_forward_pre_hook(self._note, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
            embedding.register_forward_hook(self._fill),
        ]
        embedding.add_module(_CHILD, self)

    def add(self, name: str, prompt: nn.Parameter, places: Placeholders) -> None:
        """Adds a prompt [N, D] and makes it the active one."""
        self.prompts[name], self.places[name] = prompt, places
        self.active = name

    def remove(self, name: str) -> None:
        """Removes a prompt; the last one takes the table with it."""
        if name in self.prompts:
            del self.prompts[name], self.places[name]
        if self.active == name:
            self.active = None
        if not self.places:
            for handle in self._handles:
                handle.remove()
            del self._embedding[0]._modules[_CHILD]

    def use(self, name: str | None) -> None:
        """Makes ``name`` the prompt that fills placeholders; one that has no prompt here leaves rows as they are."""
        self.active = name if name in self.places else None

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self._begins = cache is None or int(cache.get_seq_length()) == 0
        self._mask = kwargs.get("attention_mask")

    def _forget(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._begins, self._mask = True, None

    def _fill(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Replaces the embeddings [B, T, D] of each row's placeholders; later steps of a generation have none."""
        ids = args[0]
        if self.active is None or not self._begins or ids.ndim != 2:
            return output
        places, prompt = self.places[self.active], self.prompts[self.active]
        if isinstance(self._mask, torch.Tensor) and self._mask.shape == ids.shape:
            first = self._mask.int().argmax(dim=1, keepdim=True)  # [B, 1], the first token that is no padding
        else:
            first = (ids == places.token_id).int().argmax(dim=1, keepdim=True)
        columns = first + torch.arange(places.num_virtual_tokens, device=ids.device)  # [B, N]
        # Training makes its own rows, and waits for the device only where it must; this is for whoever asks.
        if not self.prompts.training and (
            columns.max() >= ids.shape[1] or (ids.gather(1, columns) != places.token_id).any()
        ):
            raise AdapterError(
                f"a row does not begin with the {places.num_virtual_tokens} placeholders of the active prompt: it "
                "would be answered without it. Make inputs with prompt_batch(), or ask through ask()."
            )
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(columns)
        return output.index_put((rows, columns), prompt.to(output.dtype).expand(len(ids), -1, -1))


def _table(model: PreTrainedModel, *, create: bool = False) -> Any:
    embedding = _input_embedding(model)
    if embedding is None:
        return None
    table = embedding._modules.get(_CHILD)
    return PromptTable(model, embedding) if table is None and create else table


def _input_embedding(model: PreTrainedModel) -> Any:
    """Returns the module that looks up tokens; None for a dual encoder, whose towers each have inputs of their own."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _initial_ids(options: PromptTuningSection, tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> Tensor:
    """Returns [N] token ids: a text's, repeated or cut to fit, or random ones."""
    wanted = options.num_virtual_tokens
    if options.prompt_tuning_init_text is None:
        return torch.randint(0, min(len(tokenizer), num_embeddings), (wanted,))
    ids = tokenizer(options.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise MethodError("method.prompt_tuning_init_text holds no token. Give a text, or leave it out.")
    return torch.tensor((ids * -(-wanted // len(ids)))[:wanted])


def _ids_with_a_meaning(model: PreTrainedModel) -> set[int]:
    """Returns the ids that fill up rows, or stand for something that is no text."""
    kinds = ("image", "video", "vision", "audio", "boi", "eoi")
    config = model.config.to_dict()
    found = {v for k, v in config.items() if k.startswith(kinds) and k.endswith(("token_id", "token_index"))}
    return {value for value in found | {model.generation_config.pad_token_id} if isinstance(value, int)}


def _placeholder_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns a legal id that no text encodes to, where there is one; else one that ends or begins a text."""
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    if rows > len(tokenizer):
        return rows - 1
    for token_id in (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None and token_id != tokenizer.pad_token_id:
            return int(token_id)
    raise MethodError("no token could stand where the prompt goes: unk, bos and eos are missing or the same as pad")

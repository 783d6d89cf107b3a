"""The check that a model answers rows in a continuous batch as ``generate`` answers them in fixed ones."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationMixin, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import DynamicLayer

from finetune.tasks.cached_rows import new_cache
from finetune.tasks.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.tasks.continuous_batching import ContinuousBatch, Group

# Largest difference of logits, relative to the largest logit of ``generate``: many times what another order of sums
# changes, and less than a wrong mask or position does.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
_STEPS = 3  # tokens of each row that are compared
_ATTENTION = ("sdpa", "eager")
BOTH_WAYS = ("token_type_ids", "cross_attention_mask")  # inputs that let a token see later ones, or other media
_TRIED: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def processors_of(model: Any) -> LogitsProcessorList:
    """Return the changes of the logits that ``generate`` makes in a greedy answer."""
    config, _ = model._prepare_generation_config(None, do_sample=False, num_beams=1, max_new_tokens=1)
    found: LogitsProcessorList = model._get_logits_processor(config, 1, device=model.device, model_kwargs={})
    return found


def why_fixed_batches(model: Any) -> str | None:
    """Return what in a model needs ``generate`` and fixed batches, for the user; None if nothing is known."""
    name, config = type(model).__name__, model.generation_config
    if config is None or type(model).generate is not GenerationMixin.generate:
        return f"{name} generates in its own way"
    if model.config.is_encoder_decoder:
        return f"{name} has an encoder and a decoder"
    if config.cache_implementation or config.prefill_chunk_size or config.use_cache is False:
        return "the generation config sets a cache"
    others = [one for one in processors_of(model) if type(one) is not RepetitionPenaltyLogitsProcessor]
    if others:
        return f"the generation config asks for {', '.join(type(one).__name__ for one in others)}"
    layers = new_cache(model).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return f"{name} has layers that do not keep all tokens in the cache"
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation not in _ATTENTION:
        return f"the attention implementation is {text._attn_implementation}"
    return None


@torch.inference_mode()
def why_not_the_same(batch: ContinuousBatch, groups: Sequence[Group], examples: Sequence[Example]) -> str | None:
    """Compare the logits of two or three rows with those of ``generate``, once for each model.

    Args:
        batch: the batch, which answers no rows yet.
        groups: all groups of rows; they are unchanged afterwards.
        examples: all rows.

    Returns:
        What differs, for the user; None if nothing does.
    """
    if batch.model not in _TRIED:
        shared = next((group for group in groups if len(group.rows) > 1), groups[0])
        other = next((group for group in groups if group is not shared), None)
        tried = [replace(one, rows=deque([*one.rows][:2])) for one in (shared, other) if one]
        try:
            _TRIED[batch.model] = _difference(batch, tried, examples)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError) as error:  # of a model whose inputs are unusual
            _TRIED[batch.model] = f"{type(batch.model).__name__} takes no continuous batch ({type(error).__name__})"
    return _TRIED[batch.model]


def _difference(batch: ContinuousBatch, groups: Sequence[Group], examples: Sequence[Example]) -> str | None:
    model, entering = batch.model, [(group, row) for group in groups for row in group.rows]
    inputs = batch.prompts.prompt_batch([examples[row] for _, row in entering]).to(model.device, model.dtype).inputs
    if found := [name for name in BOTH_WAYS if name in inputs]:
        return f"{type(model).__name__} takes {found[0]}"
    made = model.generate(
        **inputs, max_new_tokens=_STEPS, do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True
    )
    tokens = made.sequences[:, inputs["input_ids"].shape[1] :]  # [B, T]
    parts = list(batch.prefilled(entering, examples, dict.fromkeys((row for _, row in entering), _STEPS)))
    slots, order, logits = Slots(model, len(entering), pad_id=0), [], []
    for new, flying in parts:
        slots.put(new, range(len(flying)), flying)
        order += [[row for _, row in entering].index(one.row) for one in flying]
        logits.append(new.logits)
    found_logits = torch.cat(logits)
    for step, given in enumerate(made.logits):
        wanted = given[order].float()
        off = ((found_logits - wanted).abs().max() / wanted.abs().max()).item()
        if not off <= TOLERANCE[model.dtype]:
            return f"the logits of {type(model).__name__} differ by {off:.2g} of the largest"
        if step + 1 < len(made.logits):
            found_logits = slots.step(tokens[order, step].tolist())
    return None

"""The log-likelihood of some texts after the prompts of rows, of which each goes through the model once.

The texts are run as one tree behind a prompt: texts that begin with the same tokens share them, and each token attends
to its prompt and to the tokens before it in its text. So a prompt's keys and values are used by all texts, and are not
copied for each.

Legend of shapes: B rows, S texts, T tokens of a text, N tokens of a tree, L tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from finetune.core.batch import PER_TOKEN
from finetune.tasks.cached_rows import CachedRows, takes_masks
from finetune.tasks.continuous_support import BOTH_WAYS, TOLERANCE, why_fixed_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from finetune.core.batch import Batch

    Text = Sequence[int]  # token ids
    Mark = Callable[[dict[str, Any], Tensor], dict[str, Any]]  # ``mark_supervised`` of a family

# Logits of a row that are in memory at once, in numbers; a batch has as many times more as it has rows.
MOST_LOGITS = 2**22
_TRIED: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The tokens of some texts without the last one of each; nothing is predicted after that one.

    Attributes:
        ids: the id of each token, N of them.
        depths: the number of tokens before it in its text.
        ancestors: the places of the tokens of its text up to itself.
        predictors: for each text the T places whose logits predict its tokens; 0 is the end of the prompt, and 1 the
            first token of the tree.
    """

    ids: list[int]
    depths: list[int]
    ancestors: list[list[int]]
    predictors: list[list[int]]

    @classmethod
    def of(cls, texts: Sequence[Text]) -> Tree:
        """Return the tree of some texts."""
        places: dict[tuple[int, ...], int] = {}  # the beginning of a text, up to a token -> place of this token
        for text in texts:
            for stop in range(1, len(text)):
                places.setdefault(tuple(text[:stop]), len(places))
        return cls(
            ids=[beginning[-1] for beginning in places],
            depths=[len(beginning) - 1 for beginning in places],
            ancestors=[[places[one[:stop]] for stop in range(1, len(one) + 1)] for one in places],
            predictors=[[0, *(places[tuple(text[:stop])] + 1 for stop in range(1, len(text)))] for text in texts],
        )


def log_likelihoods(model: Any, batch: Batch, texts: Sequence[Text], *, mark: Mark) -> Tensor:
    """Return the log-likelihood of each text after each prompt, fp32 [B, S].

    Args:
        model: the model in eval mode, on the device of the batch.
        batch: left-padded rows, each of which ends before its answer.
        texts: the texts, at least one token each.
        mark: the function that marks supervised tokens in inputs, from the family of the model.
    """
    if why_one_by_one(model, batch, texts, mark=mark) is None:
        return after_prompts(model, CachedRows.prefill(model, batch), texts)
    return one_by_one(model, batch, texts, mark=mark)


def after_prompts(model: Any, rows: CachedRows, texts: Sequence[Text]) -> Tensor:
    """Return the log-likelihood of each text after rows whose prompts were just run, fp32 [B, S].

    The rows are unchanged afterwards.
    """
    found = []
    first = rows.logits.log_softmax(dim=-1)[:, None]  # [B, 1, V]
    for part in _parts(texts, most=MOST_LOGITS // first.shape[-1]):
        tree = Tree.of(part)
        after = torch.cat([first, _logits(model, rows, tree).log_softmax(dim=-1)], dim=1) if tree.ids else first
        for text, places in zip(part, tree.predictors, strict=True):
            found.append(after[:, places, list(text)].sum(dim=-1))
    return torch.stack(found, dim=1)


def one_by_one(model: Any, batch: Batch, texts: Sequence[Text], *, mark: Mark) -> Tensor:
    """Return the log-likelihood of each text after each prompt, fp32 [B, S], by a forward of prompt and text."""
    return torch.stack([_alone(model, batch, text, mark=mark) for text in texts], dim=1)


@torch.inference_mode()
def why_one_by_one(model: Any, batch: Batch, texts: Sequence[Text], *, mark: Mark) -> str | None:
    """Return why each text needs a forward of its own, for the user; None if a tree gives the same.

    The longest and the shortest text are compared, once for each model; arguments as for ``log_likelihoods``.
    """
    if (why := why_fixed_batches(model)) is not None:
        return why
    if model not in _TRIED:
        tried = [max(texts, key=len), min(texts, key=len)]
        try:
            _TRIED[model] = _difference(model, batch, tried, mark=mark)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError) as error:  # of a model whose inputs are unusual
            _TRIED[model] = f"{type(model).__name__} takes no tree of texts ({type(error).__name__})"
    return _TRIED[model]


def _difference(model: Any, batch: Batch, texts: Sequence[Text], *, mark: Mark) -> str | None:
    if found := [name for name in BOTH_WAYS if name in batch.inputs]:
        return f"{type(model).__name__} takes {found[0]}"
    wanted = one_by_one(model, batch, texts, mark=mark)
    off = (after_prompts(model, CachedRows.prefill(model, batch), texts) - wanted).abs().max() / wanted.abs().max()
    if not off.item() <= TOLERANCE[model.dtype]:
        return f"the log-likelihoods of {type(model).__name__} differ by {off.item():.2g} of the largest"
    return None


def _parts(texts: Sequence[Text], *, most: int) -> Iterator[list[Text]]:
    """Yield the texts in parts whose trees have at most so many tokens; every process of a run makes the same parts."""
    part: list[Text] = []
    size = 0
    for text in texts:
        if part and size + len(text) - 1 > most:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text) - 1
    if part:
        yield part


def _logits(model: Any, rows: CachedRows, tree: Tree) -> Tensor:
    """Return the fp32 logits after each token of a tree behind each row, [B, N, V]."""
    device = rows.mask.device
    num_rows, width, count = len(rows.mask), rows.mask.shape[1], len(tree.ids)
    sees = torch.zeros(count, count, dtype=torch.bool)
    for place, ancestors in enumerate(tree.ancestors):
        sees[place, ancestors] = True
    mask = torch.cat(  # [B, N, L + N]
        [rows.mask[:, None].bool().expand(-1, count, -1), sees.to(device).expand(num_rows, -1, -1)], dim=-1
    )
    attended = mask[:, None]
    if not takes_masks(model):
        attended = torch.zeros(attended.shape, dtype=model.dtype, device=device)
        attended = attended.masked_fill(~mask[:, None], torch.finfo(model.dtype).min)
    ids = torch.tensor(tree.ids, device=device).expand(num_rows, -1)  # [B, N]
    positions = rows.positions[..., -1:] + 1 + torch.tensor(tree.depths, device=device)  # [B, N] or [K, B, N]
    out = model(
        input_ids=ids,
        attention_mask=attended,
        position_ids=positions,
        past_key_values=rows.cache,
        use_cache=True,
        return_dict=True,
    )
    layers: list[Any] = rows.cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys[..., :width, :], layer.values[..., :width, :]
    logits: Tensor = out.logits.float()
    return logits


def _alone(model: Any, batch: Batch, text: Text, *, mark: Mark) -> Tensor:
    """Return the log-likelihood of one text after each prompt, fp32 [B], by one forward without a cache."""
    prompt, inputs = batch.inputs["input_ids"], dict(batch.inputs)
    own = torch.tensor(list(text), device=prompt.device).expand(len(prompt), -1)  # [B, T]
    inputs["input_ids"] = torch.cat([prompt, own], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(own)], dim=1)
    for name in PER_TOKEN:
        if name in inputs:
            last = inputs[name][:, -1:]  # of the prompt's last token, which is one of text like those that follow
            inputs[name] = torch.cat([inputs[name], last.repeat_interleave(len(text), dim=1)], dim=1)
    labels = torch.cat([torch.full_like(prompt, -100), own], dim=1)
    inputs = mark(inputs, labels)
    ids = inputs.pop("input_ids")
    positions = model._prepare_position_ids_for_generation(ids, inputs)
    inputs |= {"position_ids": positions, "use_cache": False}
    prepared = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **inputs)
    logits = model(**prepared, return_dict=True).logits[:, -len(text) - 1 : -1].float()  # [B, T, V]
    return logits.log_softmax(dim=-1).gather(2, own[..., None]).sum(dim=(1, 2))

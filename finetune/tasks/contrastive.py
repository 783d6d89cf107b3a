"""Contrastive learning of pictures and texts: each is to lie closer to its own partner than to any other.

The loss is symmetric InfoNCE over a whole window (Radford et al., https://arxiv.org/abs/2103.00020). Where rows have
equal texts, these have equal embeddings, and the sum over rows is the one in which such rows are each other's partners
(Yang et al., https://arxiv.org/abs/2204.03610): nothing is pushed apart, the least loss is above zero.
Gradients are cached at the embeddings (Gao et al., https://arxiv.org/abs/2101.06983): the memory is that of one
micro-batch, the loss that of all.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather, gather_object, pad_across_processes
from torch.utils.checkpoint import get_device_states, set_device_states

from finetune.example import texts_to_choose_from
from finetune.interfaces import LossSum
from finetune.prediction import Label
from finetune.tasks.answers import AnswerTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from finetune.batch import Batch
    from finetune.example import Example
    from finetune.prediction import Prediction
    from finetune.recipe import ContrastiveSection

_NOT_LEARNT = -100


class ContrastiveTask(AnswerTask):
    """One term, ``pairs``; a prediction is the label whose text lies closest to the picture.

    Args:
        options: of the recipe, or of the adapter.
        tokenizer: unused: a dual encoder writes no text.
    """

    options: ContrastiveSection
    couples_rows = True

    def __init__(self, options: ContrastiveSection, tokenizer: PreTrainedTokenizerBase):
        self.options = options

    def count_items(self, batch: Batch) -> dict[str, int]:
        """Returns how many pairs are learnt."""
        assert batch.labels is not None
        return {"pairs": int((batch.labels != _NOT_LEARNT).sum())}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, LossSum]:
        """Returns the summed loss, in nats, of a micro-batch that is a window of its own."""
        assert batch.labels is not None
        losses = pair_losses(_embed(model, batch), batch.labels, _scale(model))
        return {"pairs": LossSum(losses.sum(), self.count_items(batch)["pairs"])}

    def backward_window(
        self, model: nn.Module, batches: Sequence[Batch], backward: Callable[[Callable[[], Tensor]], None]
    ) -> list[dict[str, Tensor]]:
        """Runs a window forward without a graph, then each micro-batch again with one, from the cached gradient.

        Returns:
            For each micro-batch the sum of its rows' losses.
        """
        random, parts = _embed_without_graph(model, batches)
        labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
        embeddings, every_label, first = _gather(torch.cat(parts), labels)
        embeddings.requires_grad_()
        losses = pair_losses(embeddings, every_label, _scale(model))
        num_pairs = (every_label != _NOT_LEARNT).sum().clamp(min=1)  # not read back: the device is not waited for
        (gradient,) = torch.autograd.grad(losses.sum() / num_pairs, embeddings)
        mine, sizes = slice(first, first + len(labels)), [len(part) for part in parts]
        for batch, state, cached in zip(batches, random, gradient[mine].split(sizes), strict=True):

            def surrogate(batch: Batch = batch, state: _RandomState = state, cached: Tensor = cached) -> Tensor:
                with state.replayed():
                    return (_embed(model, batch) * cached).sum()  # its gradient is the cached one's

            backward(surrogate)
        return [{"pairs": part.sum()} for part in losses.detach()[mine].split(sizes)]

    @torch.inference_mode()
    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return for each image the label, of those its row may be answered with, whose text lies closest.

        The scores are the softmax over the row's own labels.
        """
        similarity = model(**batch.inputs).logits_per_image  # [B, texts]
        column = {text: i for i, text in enumerate(texts_to_choose_from(batch.examples))}
        predictions: list[Prediction] = []
        for row, example in zip(similarity, batch.examples, strict=True):
            labels = list(example.choices)
            own = row[[column[example.choices[label]] for label in labels]]  # [labels]
            scores = dict(zip(labels, own.float().softmax(dim=0).tolist(), strict=True))
            predictions.append(Label(label=labels[int(own.argmax())], scores=scores))
        return predictions

    def constant(self, examples: Sequence[Example]) -> Label:
        """Return the most frequent label of these rows."""
        label = self.most_common_answer(examples)
        return Label(label=label, scores={label: 1.0})

    def choice_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Return the summed cross entropy, in nats, of each row's right labels among its choices.

        Unlike the training loss it depends neither on the other rows of a batch nor on how many there are. It is at
        most the logarithm of the number of choices and twice the scale of the cosines.
        """
        similarity = model(**batch.inputs).logits_per_image.float()  # [B, texts]
        column = {text: i for i, text in enumerate(texts_to_choose_from(batch.examples))}
        losses = []
        for row, example in zip(similarity, batch.examples, strict=True):
            of = row.new_zeros(len(column)).fill_(-torch.inf)
            chosen = [column[text] for text in example.choices.values()]
            of[chosen] = row[chosen].log_softmax(dim=0)
            right = sorted({column[example.choices[answer]] for answer in example.answers if answer in example.choices})
            losses.append(-of[right].logsumexp(dim=0))
        return LossSum(torch.stack(losses).sum(), len(losses))

    @torch.inference_mode()
    def embed(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the fp32 embeddings [rows, D], of length 1, of a batch of pictures alone or of texts alone."""
        plain: Any = model
        embed = plain.get_image_features if "pixel_values" in batch.inputs else plain.get_text_features
        return torch.nn.functional.normalize(embed(**batch.inputs).pooler_output.float(), dim=-1)


def pair_losses(embeddings: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Returns each row's loss [N] in nats: the mean of picture to text and of text to picture.

    Args:
        embeddings: of pictures and texts, of length 1, fp32 [N, 2, D].
        labels: -100 for rows that take no part [N].
        scale: what cosines are multiplied by.
    """
    learnt = labels != _NOT_LEARNT  # [N]
    images, texts = embeddings.unbind(dim=1)  # [N, D]
    similarity = scale * images @ texts.T  # [N, N], a row for each picture
    # A row that takes no part is held against nothing but itself, so that no sum is empty.
    strange = ~(learnt[:, None] & learnt) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = similarity.masked_fill(strange, -torch.inf)
    to_text, to_image = similarity.log_softmax(dim=1).diagonal(), similarity.log_softmax(dim=0).diagonal()
    return torch.where(learnt, -(to_text + to_image) / 2, 0)


class _RandomState:
    """The state of the generators before a micro-batch was embedded, so that its dropout can be drawn once more."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.cpu = torch.get_rng_state()
        self.devices = get_device_states(*batch.inputs.values())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Runs a block from this state, and leaves the generators as they were before the block."""
        before = _RandomState(self.batch)
        self._put_back()
        try:
            yield
        finally:
            before._put_back()

    def _put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(*self.devices)


def _embed_without_graph(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[_RandomState], list[Tensor]]:
    """Returns for each micro-batch the state before it and its embeddings [B, 2, D].

    Raises:
        RuntimeError: on every process where it is raised on one: the others would wait for its embeddings.
    """
    random: list[_RandomState] = []
    parts: list[Tensor] = []
    failure: RuntimeError | None = None
    try:
        with torch.no_grad():
            for batch in batches:
                random.append(_RandomState(batch))
                parts.append(_embed(model, batch))
    except RuntimeError as error:
        failure = error
    if PartialState().num_processes > 1 and any(gather_object([failure is not None])):
        raise failure or torch.OutOfMemoryError("another process ran out of memory")
    if failure:
        raise failure
    return random, parts


def _embed(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the fp32 embeddings [B, 2, D] of pictures and texts, of length 1."""
    out: Any = model(**batch.inputs)
    return torch.stack([out.image_embeds, out.text_embeds], dim=1).float()


def _scale(model: nn.Module) -> Tensor:
    plain: Any = extract_model_from_parallel(model)
    assert not plain.logit_scale.requires_grad, "the base's temperature is frozen"
    return plain.logit_scale.float().exp()


def _gather(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Returns the rows of all processes, and where this process's begin; what fills them up takes no part."""
    state = PartialState()
    if state.num_processes == 1:
        return embeddings, labels, 0
    embeddings = pad_across_processes(embeddings)
    labels = pad_across_processes(labels, pad_index=_NOT_LEARNT)
    return gather(embeddings), gather(labels), state.process_index * len(labels)

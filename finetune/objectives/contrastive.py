"""Contrastive learning of images and texts: each image must be closer to its own text than to any other.

The loss is symmetric InfoNCE over all micro-batches of an optimizer step (Radford et al.,
https://arxiv.org/abs/2103.00020). Equal texts have equal embeddings, so the sum over rows treats rows with equal texts
as positives of each other (Yang et al., https://arxiv.org/abs/2204.03610). No such row is pushed away, and the smallest
loss is then above zero.
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

from finetune.core.example import texts_to_choose_from
from finetune.interfaces import LossSum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from finetune.core.batch import Batch
    from finetune.interfaces import Outputs, StepContext
    from finetune.recipe import ContrastiveObjectiveSection

_NOT_SUPERVISED = -100


class Contrastive:
    """One term, ``pairs``: the loss of each supervised pair of an image and a text.

    Args:
        options: the section of the recipe.
    """

    needs_reference = False

    def __init__(self, options: ContrastiveObjectiveSection):
        self.options = options

    def count_items(self, batch: Batch) -> dict[str, int]:
        """Return the number of supervised pairs."""
        assert batch.labels is not None
        return {"pairs": int((batch.labels != _NOT_SUPERVISED).sum())}

    def terms(self, step: StepContext) -> dict[str, LossSum]:
        """Return the summed loss, in nats, of a micro-batch without negatives from others."""
        labels = step.batch.labels
        assert labels is not None
        losses = pair_losses(step.forward(), labels, _scale(step.model))
        return {"pairs": LossSum(losses.sum(), self.count_items(step.batch)["pairs"])}

    def accumulate_gradients(
        self,
        model: nn.Module,
        outputs: Outputs,
        batches: Sequence[Batch],
        backward: Callable[[Callable[[], Tensor]], None],
    ) -> list[dict[str, Tensor]]:
        """Run all micro-batches forward without a graph, then each again with a graph, from the cached gradient.

        Returns:
            For each micro-batch the sum of its rows' losses.
        """
        random, parts = _embed_without_graph(model, outputs, batches)
        labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
        embeddings, every_label, first = _gather(torch.cat(parts), labels)
        embeddings.requires_grad_()
        losses = pair_losses(embeddings, every_label, _scale(model))
        num_pairs = (every_label != _NOT_SUPERVISED).sum().clamp(min=1)  # stays on the device, so the CPU does not wait
        (gradient,) = torch.autograd.grad(losses.sum() / num_pairs, embeddings)
        mine, sizes = slice(first, first + len(labels)), [len(part) for part in parts]
        for batch, state, cached in zip(batches, random, gradient[mine].split(sizes), strict=True):

            def surrogate(batch: Batch = batch, state: _RandomState = state, cached: Tensor = cached) -> Tensor:
                with state.replayed():
                    return (outputs(model, batch) * cached).sum()  # its gradient equals the cached gradient

            backward(surrogate)
        return [{"pairs": part.sum()} for part in losses.detach()[mine].split(sizes)]

    def choice_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Return the summed cross entropy, in nats, of each row's right labels among its choices.

        Unlike the training loss, it does not depend on the other rows of a batch or their number. It is at most the
        logarithm of the number of choices plus twice the scale of the cosines.
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


def pair_losses(embeddings: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Return each row's loss [N] in nats: the mean of image to text and of text to image.

    Args:
        embeddings: the embeddings of images and texts, of length 1, fp32 [N, 2, D].
        labels: -100 for rows that are not supervised [N].
        scale: the factor on cosines.
    """
    supervised = labels != _NOT_SUPERVISED  # [N]
    images, texts = embeddings.unbind(dim=1)  # [N, D]
    similarity = scale * images @ texts.T  # [N, N], a row for each image
    # A row that is not supervised is compared only with itself, so that no sum is empty.
    strange = ~(supervised[:, None] & supervised) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = similarity.masked_fill(strange, -torch.inf)
    to_text, to_image = similarity.log_softmax(dim=1).diagonal(), similarity.log_softmax(dim=0).diagonal()
    return torch.where(supervised, -(to_text + to_image) / 2, 0)


class _RandomState:
    """The state of the random generators before a micro-batch was embedded, to repeat its dropout."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.cpu = torch.get_rng_state()
        self.devices = get_device_states(*batch.inputs.values())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run a block from this state, and restore the generators after the block."""
        before = _RandomState(self.batch)
        self._put_back()
        try:
            yield
        finally:
            before._put_back()

    def _put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(*self.devices)


def _embed_without_graph(
    model: nn.Module, outputs: Outputs, batches: Sequence[Batch]
) -> tuple[list[_RandomState], list[Tensor]]:
    """Return for each micro-batch the state before it, and its embeddings [B, 2, D].

    Raises:
        RuntimeError: a process failed; it is raised on all, which would otherwise wait for its embeddings.
    """
    random: list[_RandomState] = []
    parts: list[Tensor] = []
    failure: RuntimeError | None = None
    try:
        with torch.no_grad():
            for batch in batches:
                random.append(_RandomState(batch))
                parts.append(outputs(model, batch))
    except RuntimeError as error:
        failure = error
    if PartialState().num_processes > 1 and any(gather_object([failure is not None])):
        raise failure or torch.OutOfMemoryError("another process ran out of memory")
    if failure:
        raise failure
    return random, parts


def _scale(model: nn.Module) -> Tensor:
    plain: Any = extract_model_from_parallel(model)
    assert not plain.logit_scale.requires_grad, "the base's temperature is frozen"
    return plain.logit_scale.float().exp()


def _gather(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the rows of all processes, and the index of this process's first row; padding rows are not supervised."""
    state = PartialState()
    if state.num_processes == 1:
        return embeddings, labels, 0
    embeddings = pad_across_processes(embeddings)
    labels = pad_across_processes(labels, pad_index=_NOT_SUPERVISED)
    return gather(embeddings), gather(labels), state.process_index * len(labels)

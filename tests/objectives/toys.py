"""An objective of the tests' own, which asks for the base's own outputs."""

import torch

from finetune.interfaces import LossSum


class Nearness:
    """One term, ``tokens``: the divergence KL(base || adapted), in nats, of each supervised token."""

    needs_reference = True

    def count_items(self, batch):
        return {"tokens": len(batch.targets.tokens)}

    def terms(self, step):
        return {"tokens": LossSum(divergence(step.forward(), step.reference()), len(step.batch.targets.tokens))}


def divergence(adapted, base):
    """The sum over rows of KL(base || adapted) of logits [N, V]; exactly zero where both are equal."""
    there, here = base.float().log_softmax(dim=-1), adapted.float().log_softmax(dim=-1)
    return (there.exp() * (there - here)).sum()


def supervised(model, batch):
    """The logits [N, V] that predict the supervised tokens, by a forward of everything."""
    logits = model(**batch.inputs, use_cache=False).logits
    return logits[:, :-1][batch.labels[:, 1:] != -100]


def spread(attachment, std=0.05):
    """Have every parameter of an adapter have an effect."""
    with torch.no_grad():
        for parameter in attachment.parameters.values():
            parameter.add_(std * torch.randn_like(parameter))

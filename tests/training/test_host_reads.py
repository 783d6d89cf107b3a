"""A step waits for the device once: what is read back from it, counted on the CPU by the operations that would wait."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.assemble.batches import Batches
from finetune.objectives.contrastive import pair_losses
from finetune.training import loop, trainable

PACKAGE = str(Path(loop.__file__).parents[1])
TORCH = str(Path(torch.__file__).parent)
aten = torch.ops.aten
# Their result, or its size, is known only when everything before is done.
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
WAITING |= {aten.is_nonzero.default, aten._unique2.default}


class Reads(TorchDispatchMode):
    """Counts reads by the file of this package that makes them; those of libraries inside the model are not ours."""

    def __init__(self):
        super().__init__()
        self.by_file = Counter()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused and (func in WAITING or (func is aten.index.Tensor and _by_mask(args[1]))):
            self._note()
        return func(*args, **(kwargs or {}))

    def _note(self):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith((TORCH, __file__)):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(PACKAGE):
            self.by_file[str(Path(frame.f_code.co_filename).relative_to(PACKAGE))] += 1

    def on_the_host(self, function):
        """Return a function that works on rows that are not yet on the device: its reads wait for nothing."""

        def run(*args, **options):
            self.paused = True
            try:
                return function(*args, **options)
            finally:
                self.paused = False

        return run


def _by_mask(indices):
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def reads_of_each_step(trainer, examples, monkeypatch):
    reads, steps = Reads(), []
    monkeypatch.setattr(loop, "count_step_items", reads.on_the_host(loop.count_step_items))
    monkeypatch.setattr(loop.MicroBatchLoader, "micro_batches", reads.on_the_host(loop.MicroBatchLoader.micro_batches))
    # tolist of several values reads their memory without an operation.
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (None if reads.paused else reads._note(), tolist(t))[1])
    update = loop.Trainer._update

    def counted(self, *args):
        values = update(self, *args)
        steps.append(Counter(reads.by_file))
        reads.by_file.clear()
        return values

    monkeypatch.setattr(loop.Trainer, "_update", counted)
    with reads:
        trainer.train(examples)
    return steps


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_step_reads_once(build, tiny_base, monkeypatch, optim):
    run = build(tiny_base, max_steps=4, batch_size=2, gradient_accumulation_steps=2, dropout=0.1, optim=optim)
    first, second, *others = reads_of_each_step(run.trainer, run.examples, monkeypatch)
    looked = {"training/loop.py": 1, "training/trainable.py": 1}
    assert first == second == looked, "whether B, and then A, has a gradient"
    assert others == [{"training/loop.py": 1}] * 2


def test_a_prompt_reads_nothing(build, tiny_base, monkeypatch):
    run = build(tiny_base, max_steps=3, method={"name": "prompt_tuning", "num_virtual_tokens": 2})
    run.trainer.collate = Batches(run.base.collator, run.attachment.placeholders).training_batch
    _, *others = reads_of_each_step(run.trainer, run.examples, monkeypatch)
    assert others == [{"training/loop.py": 1}] * 2


def test_what_waits_is_counted():
    """The counter itself, on each way to wait."""
    reads, found = Reads(), torch.tensor([1.0, 2.0])
    with reads:
        for wait in ("int(t.sum())", "t[t > 1]", "(t != 0).nonzero()", "bool((t > 0).all())", "t.masked_select(t > 1)"):
            eval(compile(wait, trainable.__file__, "eval"), {"t": found})
    assert reads.by_file == {"training/trainable.py": 5}


def test_pairs_read_nothing():
    embeddings = torch.nn.functional.normalize(torch.randn(4, 2, 8), dim=-1).requires_grad_()
    labels = torch.tensor([0, -100, 0, 0])
    with Reads() as reads:
        pair_losses(embeddings, labels, torch.tensor(3.0)).sum().backward()
    assert not reads.by_file
    assert embeddings.grad[1].eq(0).all() and embeddings.grad[[0, 2, 3]].ne(0).all()

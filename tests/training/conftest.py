"""A trainer on a tiny base, as runs.train puts it together."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from finetune.assemble.loading import load_base
from finetune.assemble.rows import examples_of
from finetune.methods.adapter import attach
from finetune.training.checkpoint import Checkpoints
from finetune.training.log import RunLog
from finetune.training.loop import Trainer


@pytest.fixture
def build(make_recipe, tmp_path):
    """Return a function: base folder, train options -> base, attachment, trainer, examples, log, checkpoints."""

    def build(folder, *, dropout=0.0, towers=None, method=None, wrap=lambda objective: objective, **options):
        length = {} if "epochs" not in options else {"max_steps": None}
        lora = {"towers": towers} if towers else {}
        recipe = make_recipe(
            folder,
            train={**length, **options},
            **({"method": [method]} if method else {"method": {"lora_dropout": dropout, **lora}}),
        )
        base = load_base(str(folder), device="cpu")
        torch.manual_seed(0)
        attachment = attach(base.host, recipe.method)
        log = RunLog(tmp_path, every=1)
        checkpoints = Checkpoints(tmp_path / "checkpoints", {"recipe": {"seed": 0}}, keep=2)
        trainer = Trainer(
            base.model,
            attachment,
            wrap(base.objective(base.task(recipe.task), placeholders=attachment.placeholders)),
            base.collator.training_batch,
            recipe.train,
            Accelerator(cpu=True),
            log,
            seed=0,
            checkpoints=checkpoints,
        )
        return SimpleNamespace(
            base=base,
            attachment=attachment,
            trainer=trainer,
            examples=examples_of(recipe, "train", base=base),
            checkpoints=checkpoints,
            lines=lambda: [json.loads(line) for line in log.file.read_text().splitlines()],
            weights=lambda: {name: p.detach().clone() for name, p in attachment.parameters.items()},
        )

    return build


class Wrapped:
    """An objective over a task that calls ``before(batch)`` before each forward that trains."""

    def __init__(self, objective, before):
        self.objective, self.before = objective, before

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def terms(self, model, batch):
        change = self.before(batch)
        terms = self.objective.terms(model, batch)
        return change(terms) if change else terms


@pytest.fixture
def before_each_forward():
    """Return a function: callable of a batch -> what ``build`` takes as ``wrap``."""
    return lambda before: lambda objective: Wrapped(objective, before)

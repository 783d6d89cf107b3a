"""One process of a run: trains scenarios one after the other and leaves what each came to.

``python worker.py SCENARIOS.json FOLDER``, by itself or under torchrun. A scenario names a base and a method, and may
have: batch_size, accumulation, steps, checkpointing, dtype, rows (how many), blind (rows without an image), uneven
(answers of very different lengths), strategy (plain, fsdp2, zero2 or zero3), answers (how many rows to answer), stop
(steps after which it is built anew and goes on from its checkpoint), near (the weight of an objective that asks for the
base's own outputs, beside the task's own).
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from transformers.integrations import HfDeepSpeedConfig

from finetune.assemble.batches import Batches
from finetune.assemble.loading import load_base
from finetune.core.example import answer, ask
from finetune.evaluation.predict import Predictor
from finetune.methods.adapter import attach
from finetune.objectives.weighted import Weighted
from finetune.runs.saving import probe_effect
from finetune.training.checkpoint import Checkpoints
from finetune.training.deepspeed import DeepSpeed
from finetune.training.fsdp2 import SplitBase
from finetune.training.log import RunLog
from finetune.training.loop import Trainer
from finetune.training.replicated import Replicated
from tests.matrix import recipe_of, rows
from tests.objectives.toys import Nearness


def examples_of(scenario):
    """Rows of which some have no image, or much longer answers."""
    found = rows(scenario.get("rows", 7))
    for i in scenario.get("blind", ()):
        question = f"What color is it, row {i}?"
        found[i] = replace(found[i], media=(), messages=[*ask(question, num_images=0), found[i].messages[-1]])
    if scenario.get("uneven"):
        for i, example in enumerate(found):
            text = "it is " * (i * 3 % 7) + example.answers[0]
            found[i] = replace(example, messages=[*example.messages[:-1], answer(text)])
    return found


class OnDeepSpeed:
    """An accelerator as a launch with DeepSpeed gives it, which accelerate does on GPUs only."""

    def __init__(self, accelerator, *, stage):
        self.accelerator = accelerator
        config = {
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
            "zero_allow_untested_optimizer": True,
        }
        self.state = SimpleNamespace(
            deepspeed_plugin=SimpleNamespace(zero_stage=stage, deepspeed_config=config, dschf=HfDeepSpeedConfig(config))
        )

    def __getattr__(self, name):
        return getattr(self.accelerator, name)

    def prepare(self, model, optimizer):
        """As accelerate calls it, and wraps what it returns."""
        import deepspeed

        config = self.state.deepspeed_plugin.deepspeed_config
        engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config_params=config)
        return engine, DeepSpeedOptimizerWrapper(optimizer)


def build(scenario, accelerator, folder):
    """A trainer as runs.train puts it together."""
    recipe = recipe_of(scenario["method"], scenario["base"], folder)
    kind, strategy = scenario.get("strategy"), Replicated(accelerator)
    if kind in ("zero2", "zero3"):
        strategy = DeepSpeed(OnDeepSpeed(accelerator, stage=int(kind[-1])))
    if kind == "fsdp2":
        accelerator.state.fsdp_plugin = SimpleNamespace(reshard_after_forward=True)
        strategy = SplitBase(accelerator)
    base = load_base(scenario["base"], device=strategy.load_device, dtype=scenario.get("dtype", "float32"))
    strategy.split(base.model, base.towers)
    torch.manual_seed(0)
    attachment = attach(base.host, recipe.method)
    for name, parameter in attachment.parameters.items():
        if "lora_" in name:  # B is zero at first, which hides the gradient of A
            torch.nn.init.normal_(parameter, std=0.05)
    options = recipe.train.model_copy(
        update={
            "max_steps": scenario.get("steps", 2),
            "batch_size": scenario["batch_size"],
            "gradient_accumulation_steps": scenario.get("accumulation", 1),
            "gradient_checkpointing": scenario.get("checkpointing", False),
            # AdamW makes full steps of gradients that are mere rounding, so its rate bounds how far those may part.
            "learning_rate": 1e-4,
            "save_steps": 1,
        }
    )
    checkpoints = Checkpoints(folder / "checkpoints", {"recipe": {"seed": 0}}, keep=2)
    log = RunLog(folder, every=1, main=accelerator.is_main_process)
    batches = Batches(base.collator, attachment.placeholders)
    task = base.task(base.default_task)
    objective = base.objective(task, placeholders=attachment.placeholders)
    if weight := scenario.get("near"):
        both = Weighted({"own": (1.0, objective.objective), "near": (weight, Nearness())})
        objective = replace(objective, objective=both)
    trainer = Trainer(
        base.model, attachment, objective, batches.training_batch, options, accelerator, log,
        seed=0, strategy=strategy, checkpoints=checkpoints,
    )  # fmt: skip
    return SimpleNamespace(
        base=base, attachment=attachment, batches=batches, task=task, trainer=trainer, checkpoints=checkpoints
    )


def run(scenario, accelerator, folder):
    """Train one scenario, and return tensors and texts."""
    folder.mkdir(parents=True, exist_ok=True)
    made, examples = build(scenario, accelerator, folder), examples_of(scenario)
    gradients = []
    clip = made.trainer.strategy.clip

    def clip_and_keep(max_norm):
        held = {n: made.trainer.strategy.gradient(p) for n, p in made.attachment.parameters.items()}
        gradients.append({n: g.clone() for n, g in held.items() if g is not None})
        return clip(max_norm)

    made.trainer.strategy.clip = clip_and_keep
    if stop := scenario.get("stop"):
        made.trainer.options = made.trainer.options.model_copy(update={"max_steps": stop})
        made.trainer.train(examples)
        made = build(scenario, accelerator, folder)
        made.trainer.restore(made.checkpoints.newest(print))
    made.trainer.train(examples)
    attachment = made.trainer.strategy.finish()
    found = {
        "gradients": gradients[0],
        "weights": {name: p.detach().clone() for name, p in attachment.parameters.items()},
        "losses": [json.loads(line)["loss"] for line in made.trainer.log.file.read_text().splitlines()],
        "checkpoint": made.checkpoints.newest(print).tensors if accelerator.is_main_process else {},
        "probe": torch.tensor(probe_effect(made.base, attachment).adapter),
    }
    if count := scenario.get("answers"):
        made.base.model.eval()
        rows_to_answer, asked = examples_of({**scenario, "rows": count}), []

        def prompt_batch(batch):
            asked.extend(example.id for example in batch)
            return made.batches.prompt_batch(batch)

        predictor = Predictor(
            model=made.base.model,
            task=made.task,
            prompt_batch=prompt_batch,
            batch_size=2,
            accelerator=accelerator,
        )
        predictions = predictor(rows_to_answer, title="answering")
        found["answers"] = [str(prediction) for prediction in predictions]
        found["asked"] = gather_object(asked)
    held = [p for p in made.base.model.parameters() if not p.requires_grad]
    found["held"] = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in held)
    return found


def main():
    """Run every scenario, in order."""
    scenarios, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    for number, scenario in enumerate(scenarios):
        found = run(scenario, accelerator, folder / str(number))
        torch.save(found, folder / f"{number}.{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()

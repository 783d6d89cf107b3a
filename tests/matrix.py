"""Families by methods: what one cell of the table goes through, from attaching to merging.

``METHODS`` maps the name of a row to the recipe's ``method`` section; a new method is a row here.
"""

import json
from pathlib import Path

import numpy as np
import torch

from finetune.assemble.base import Base
from finetune.assemble.loading import load_base
from finetune.core.batch import Batch
from finetune.core.example import Example, answer, as_images, ask
from finetune.methods.adapter import attach, detach, merge, switch
from finetune.model_types import architecture_of
from finetune.recipe import parse_recipe
from finetune.runs.saving import probe_effect, save_adapter
from finetune.training.loop import set_train_mode

LORA = {"name": "lora", "r": 4, "lora_alpha": 16}
PROMPT = {"name": "prompt_tuning", "num_virtual_tokens": 5, "prompt_tuning_init_text": "What color"}
METHODS = {
    "lora": LORA,
    "lora-projector": {**LORA, "towers": {"language": "none", "projector": "all-linear"}},
    "lora-vision": {**LORA, "towers": {"language": "none", "vision": "all-linear"}},
    "rslora": {**LORA, "use_rslora": True},
    "dora": {**LORA, "use_dora": True},
    "lora+": {**LORA, "loraplus_lr_ratio": 4.0},
    "prompt_tuning": PROMPT,
    "projector": {"name": "full_modules", "parameters": ["projector"]},
    "norms": {"name": "full_modules", "parameters": ["norms"]},
    "lora+prompt": [LORA, PROMPT],
    "lora+prompt+projector": [PROMPT, {"name": "full_modules", "parameters": ["projector", "norms"]}, LORA],
}
UNMERGED = {"prompt_tuning", "lora+prompt", "lora+prompt+projector"}  # a prompt stands in the rows, not in the weights
STEPS = 3


def rows(count: int = 4) -> list[Example]:
    """Rows about red and blue images, of two sizes and several lengths."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(count):
        color = ("red", "blue")[i % 2]
        pixels = rng.integers(0, 60, ((40, 32), (32, 40))[i % 2] + (3,), dtype=np.uint8)
        pixels[..., 0 if color == "red" else 2] += 180
        text = color if i % 3 else f"it is {color}"
        messages = [*ask("What color is it?" if i % 2 else "Is it red or blue?"), answer(text)]
        examples.append(Example(id=str(i), messages=messages, media=as_images([pixels]), answers=[text]))
    return examples


def recipe_of(method: object, base: str | Path, folder: Path, *, quantization: str | None = None):
    """The recipe of a cell, with the task that its base does."""
    model_type = json.loads((Path(base) / "config.json").read_text())["model_type"]
    raw = {
        "name": "cell",
        "domain": "testing",
        "model": {"name_or_path": str(base), "device": "cpu", "quantization": quantization},
        "method": method,
        "data": {"source": "procedural", "name": "medical"},
        "task": {"name": task_of(model_type)}
        | ({"max_new_tokens": 16} if architecture_of(model_type) == "generative" else {}),
        "train": {"max_steps": STEPS, "output_dir": str(folder)},
    }
    return parse_recipe(raw, source="cell")


def task_of(model_type: str) -> str:
    """The name of the task that a family does."""
    return {"dual_encoder": "contrastive", "generative": "vqa"}[architecture_of(model_type)]


def logits(base: Base, batch: Batch) -> torch.Tensor:
    """fp32 outputs: logits [B, T, V], or embeddings [B, 2, D]."""
    with torch.no_grad():
        return base.family.outputs(base.model, batch.inputs).float()


def extended(attachment, batch: Batch) -> Batch:
    """The batch with the places that an adapter's prompt fills, where it has one."""
    return attachment.placeholders.insert(batch) if attachment.placeholders else batch


def state(model) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def losses(base: Base, attachment, batch: Batch, *, lr: float, steps: int = STEPS) -> list[float]:
    """The mean loss before each of some steps, and after the last."""
    model, objective = base.model, base.objective(base.task(base.default_task))
    factors = attachment.learning_rates
    groups = [{"params": [p], "lr": lr * factors.get(name, 1.0)} for name, p in attachment.parameters.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    found = []
    for step in range(steps + 1):
        set_train_mode(model, attachment)
        (term,) = objective.terms(model, batch).values()
        loss = term.loss_sum / term.num_items
        found.append(loss.item())
        if step < steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    return found


def train_cell(
    base_folder: Path, method: object, folder: Path, *, quantization: str | None = None, dtype: str = "float32"
) -> dict[str, object]:
    """Attaches, trains three steps and saves; checks the base on the way.

    Returns:
        What the reload must find: the adapter's folder, logits with it, losses.
    """
    torch.manual_seed(0)
    recipe = recipe_of(method, base_folder, folder, quantization=quantization)
    base = load_base(str(base_folder), device="cpu", quantization=quantization, dtype=dtype)
    examples = rows()
    batch = base.collator.training_batch(examples).to("cpu", base.model.dtype)
    before, plain = state(base.model), logits(base, batch)
    attachment = attach(base.host, recipe.method)
    # A dual encoder's temperature multiplies its gradients: by 14 before training.
    lr = 0.005 if base.family.architecture == "dual_encoder" else 0.02
    found = losses(base, attachment, extended(attachment, batch), lr=lr)
    assert found[-1] < found[0], f"the loss does not fall: {found}"
    attachment.freeze()
    adapted = logits(base, extended(attachment, batch))
    probe = probe_effect(base, attachment)
    splits = {"train": examples}
    save_adapter(folder / "adapter", recipe, base, attachment, splits, {}, probe=probe, steps=STEPS)
    switch(base.model, on=False)
    assert torch.equal(logits(base, batch), plain), "switched off, the base answers otherwise"
    detach(base.model)
    after = state(base.model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), "the base changed"
    np.save(folder / "logits.npy", adapted.numpy())
    where = {"folder": str(folder), "base": str(base_folder), "quantization": quantization, "dtype": dtype}
    return {**where, "losses": found}


def reload_cell(cell: dict) -> dict[str, object]:
    """Load a saved cell on a fresh base; compare its logits; merges it where that can be."""
    from finetune.serving.loading import load

    held = {"quantization": cell["quantization"], "dtype": cell["dtype"]}
    vlm = load(Path(cell["folder"]) / "adapter", base=cell["base"], device="cpu", **held)
    batch = vlm.base.collator.training_batch(rows()).to("cpu", vlm.model.dtype)
    places = vlm.adapter.placeholders
    adapted = logits(vlm.base, places.insert(batch) if places else batch)
    saved = torch.from_numpy(np.load(Path(cell["folder"]) / "logits.npy"))
    found: dict[str, object] = {"reloaded": torch.equal(adapted, saved), "off": (adapted - saved).abs().max().item()}
    if places is None and cell["quantization"] is None:
        updates = vlm.adapter.updates
        vlm.use(None)
        merge(updates)
        off = (logits(vlm.base, batch) - adapted).abs().max() / adapted.abs().max()
        found["merged_off"] = off.item()  # relative to the largest logit
    return found


def reload_all(cells_file: str) -> None:
    """In a fresh process: reloads all cells of a JSON file, and writes what was found beside it."""
    cells = json.loads(Path(cells_file).read_text())
    Path(cells_file).with_suffix(".found.json").write_text(json.dumps([reload_cell(cell) for cell in cells]))

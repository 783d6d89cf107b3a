"""Pretraining of the pocket model on the procedural world.

First the vision tower alone learns to predict, for each patch, the shape, colour, pattern and outline of the object
that covers it. Then the whole model learns rows of one image with several questions as turns, by next-token loss on the
answers plus the dense loss. The dense head is removed at the end; without it, a tower of this size needs many times
more images.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import FastVlmForConditionalGeneration, PreTrainedTokenizerFast

from finetune.pocket.blueprint import (
    CHANNELS,
    END,
    IMAGE,
    IMAGE_TOKENS,
    STRIDE,
    build_model,
    build_processor,
    build_tokenizer,
)
from finetune.pocket.drawing import SIDE, random_for
from finetune.pocket.scene import Scene
from finetune.pocket.words import WORDS
from finetune.pocket.world import CELL_CLASSES, CELLS, draw_scene


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """The options of the pretraining run."""

    folder: Path  # for checkpoints and the finished model
    seed: int = 0
    vision_steps: int = 1000  # optimizer steps of the tower alone
    steps: int = 2600  # optimizer steps in all
    batch_size: int = 64  # images
    images: int = 40_000  # number of different images; each repeats with other questions
    turns: int = 6  # largest number of questions for an image
    peak_lr: float = 2e-3  # AdamW
    peak_muon_lr: float = 0.02  # Muon, for the matrices
    warmup: int = 100  # steps, of each stage
    checkpoint_minutes: float = 5.0
    device: str = "cpu"


class WorldRows(torch.utils.data.IterableDataset):
    """Batches ``first`` to ``steps`` of the pretraining run; a batch is a pure function of its number."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: PretrainOptions, first: int):
        self.tokenizer, self.options, self.first = tokenizer, options, first
        self._drawn: dict[int, Scene] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield dicts of tensors.

        All hold pixel_values [B, 3, S, S], cells [B, 64, 3] and outline [B, 64, 64]; those after the first stage
        also input_ids and weights [B, T].
        """
        for step in range(self.first, self.options.steps):
            numbers = range(step * self.options.batch_size, (step + 1) * self.options.batch_size)
            scenes = [self._scene(number % self.options.images) for number in numbers]
            batch = _images(scenes)
            if step >= self.options.vision_steps:
                batch |= self._texts([self._row(n, scene) for n, scene in zip(numbers, scenes, strict=True)])
            yield batch

    def _scene(self, number: int) -> Scene:
        if number not in self._drawn:
            self._drawn[number] = draw_scene(self.options.seed, "train", number)
        return self._drawn[number]

    def _row(self, number: int, scene: Scene) -> tuple[list[int], list[float]]:
        rng = random_for(self.options.seed, "turns", number)
        encode = self.tokenizer.encode
        ids = encode("<|user|>") + encode(IMAGE) * IMAGE_TOKENS
        weights = [0.0] * len(ids)
        picked = rng.permutation(len(scene.questions))[: self.options.turns]
        turns = [(scene.questions[i].text, scene.questions[i].answer) for i in picked]
        if rng.random() < 0.25:
            word = str(rng.choice(WORDS))
            turns.insert(int(rng.integers(len(turns) + 1)), (f"Say {word}.", word))
        for i, (question, answer) in enumerate(turns):
            prompt = encode(("<|user|>" if i else "") + question + END + "<|assistant|>")
            reply = encode(" " + answer + END)
            ids += prompt + reply
            # Long answers count more than short ones, but not in proportion to their tokens.
            weights += [0.0] * len(prompt) + [len(reply) ** -0.5] * len(reply)
        return ids, weights

    def _texts(self, rows: list[tuple[list[int], list[float]]]) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        weights = torch.zeros(len(rows), longest)
        for i, (ids, weight) in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            weights[i, : len(ids)] = torch.tensor(weight)
        return {"input_ids": input_ids, "weights": weights}


def _images(scenes: list[Scene]) -> dict[str, Tensor]:
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    cells = torch.from_numpy(np.stack([s.cells for s in scenes if s.cells is not None])).flatten(1, 2)
    masks = torch.from_numpy(np.stack([s.mask for s in scenes if s.mask is not None]))  # [B, S, S]
    side = SIDE // CELLS
    outline = masks.view(-1, CELLS, side, CELLS, side).permute(0, 1, 3, 2, 4).reshape(len(scenes), CELLS**2, -1)
    return {"pixel_values": images.float() / 127.5 - 1, "cells": cells.long(), "outline": outline.float()}


class DenseHead(nn.Module):
    """A linear layer that maps each place of the tower's output to classes and outlines of the patches it covers."""

    def __init__(self, width: int):
        super().__init__()
        self.outputs = sum(CELL_CLASSES) + (SIDE // CELLS) ** 2
        self.fold = CELLS * STRIDE // SIDE  # patches on a side of one place
        self.read = nn.Linear(width, self.fold**2 * self.outputs)
        # Most patches are empty, so the class "no object" gets less weight.
        for name, classes in zip(("shape", "color", "pattern"), CELL_CLASSES, strict=True):
            self.register_buffer(name, torch.tensor([0.15] + [1.0] * (classes - 1)), persistent=False)

    def forward(self, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Return the dense loss; ``features`` [B, D, 4, 4]."""
        out = self.read(features.permute(0, 2, 3, 1))  # [B, 4, 4, fold * fold * outputs]
        b, h, w, _ = out.shape
        out = out.view(b, h, w, self.fold, self.fold, self.outputs).permute(0, 1, 3, 2, 4, 5)
        *classes, outline = out.reshape(b, CELLS**2, self.outputs).split([*CELL_CLASSES, (SIDE // CELLS) ** 2], dim=-1)
        loss = 2 * nn.functional.binary_cross_entropy_with_logits(outline.float(), batch["outline"])
        for i, (name, logits) in enumerate(zip(("shape", "color", "pattern"), classes, strict=True)):
            target, weight = batch["cells"][..., i].flatten(), getattr(self, name)
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1).float(), target, weight=weight)
        return loss


def losses(model: FastVlmForConditionalGeneration, head: DenseHead, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the dense loss and, for a batch with text, the answer loss."""
    features = model.model.get_image_features(batch["pixel_values"], return_dict=True)
    out = {"dense": head(features.last_hidden_state, batch)}
    if "input_ids" in batch:
        hidden = model.model(
            input_ids=batch["input_ids"], mm_encoder_outputs={"image": features}, use_cache=False
        ).last_hidden_state
        target, weight = batch["input_ids"][:, 1:], batch["weights"][:, 1:]
        supervised = weight > 0
        logits = model.lm_head(hidden[:, :-1][supervised])  # [supervised, V]
        token_loss = nn.functional.cross_entropy(logits.float(), target[supervised], reduction="none")
        out["answer"] = (token_loss * weight[supervised]).sum() / weight.sum()
    return out


def optimizers(model: nn.Module, head: nn.Module, options: PretrainOptions) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the model, and AdamW for all other parameters."""
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in [*model.parameters(), *head.parameters()] if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=options.peak_muon_lr, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=options.peak_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def pretrain(options: PretrainOptions) -> FastVlmForConditionalGeneration:
    """Train the pocket model from random weights, or from the newest checkpoint in ``options.folder``.

    Returns:
        The trained model in fp32; it and its processor are also saved in ``options.folder / "model"``.
    """
    torch.manual_seed(options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(_tokenizer_texts(options.seed))
    model = build_model(tokenizer)
    model.to(options.device)  # type: ignore[arg-type]  # transformers types `to` wrongly
    head = DenseHead(CHANNELS[-1]).to(options.device)
    steppers = optimizers(model, head, options)
    checkpoint, first = options.folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=options.device)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        first = state["step"]
    rows = WorldRows(tokenizer, options, first)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=1, prefetch_factor=4)
    peaks = [options.peak_muon_lr, options.peak_lr]
    saved_at = time.monotonic()
    model.train()
    with (options.folder / "log.jsonl").open("a") as log, tqdm(total=options.steps, initial=first) as bar:
        for step, batch in enumerate(loader, start=first):
            batch = {name: tensor.to(options.device) for name, tensor in batch.items()}
            for stepper, peak in zip(steppers, peaks, strict=True):
                stepper.param_groups[0]["lr"] = peak * schedule(step, options)
            with torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16):
                terms = losses(model, head, batch)
            # A full weight would let the dense loss dominate the tower; the answers matter more.
            loss = terms["dense"] if "answer" not in terms else terms["answer"] + 0.3 * terms["dense"]
            loss.backward()
            nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad(set_to_none=True)
            if step % 20 == 0:
                line = {"step": step, **{name: round(term.item(), 4) for name, term in terms.items()}}
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix(line)
            bar.update()
            if time.monotonic() - saved_at > 60 * options.checkpoint_minutes:
                _save_checkpoint(checkpoint, step + 1, model, head, steppers)
                saved_at = time.monotonic()
    model.eval()
    folder = options.folder / "model"
    model.half().save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    config = folder / "config.json"  # weights are stored in half precision, and compute in full precision
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    (folder / "model.safetensors").chmod(0o644)
    return model.float()


def schedule(step: int, options: PretrainOptions) -> float:
    """Return the factor of the learning rates: a cosine to zero over the run, with a warm-up in each stage."""
    since = step - options.vision_steps if step >= options.vision_steps else step
    cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
    return cosine * min(1.0, (since + 1) / options.warmup)


def _tokenizer_texts(seed: int) -> Iterator[str]:
    for index in range(1500):
        for question in draw_scene(seed, "tokenizer", index).questions:
            yield f"{question.text} {question.answer}"
    for word in WORDS:
        yield from (f"{word} {word}",) * 20


def _save_checkpoint(
    path: Path, step: int, model: nn.Module, head: nn.Module, steppers: list[torch.optim.Optimizer]
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "head": head.state_dict(),
        "optimizers": [stepper.state_dict() for stepper in steppers],
    }
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    os.replace(aside, path)

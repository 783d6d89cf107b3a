"""One vector of image features a row, from the vision tower of the frozen base; this machine keeps the vectors."""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.core.batch import STORED_OUTPUTS, Batch
from finetune.core.cache import Notes
from finetune.data.image_checks import digests_of
from finetune.errors import ModelError, plain
from finetune.runs.frozen_features import base_key
from finetune.training.memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from accelerate import Accelerator

    from finetune.assemble.base import Base
    from finetune.core.example import Example
    from finetune.interfaces import TaskCollator

    Inputs = Mapping[str, Any]

_NOTES = "image_vectors.sqlite"  # key of a row's images and of the base -> their vector
_AT_ONCE = 256  # vectors that are written together
_WAITING = 4  # batches of inputs that may wait for others of their shape


class ImageVectors:
    """The vectors of rows: the mean over all tokens of a row's images at the projector, before any adapter is attached.

    The vision tower runs once for each different set of images, without its projector. A base without a projector gives
    the output of its vision tower.

    Args:
        base: the base, without an adapter.
        collator: the collator that opens the images of rows.
        stored: the collator of a run, which is used instead if it stores all that the projector gets.
        batch_size: the largest number of rows of a forward.
    """

    def __init__(self, base: Base, collator: TaskCollator, *, stored: TaskCollator | None = None, batch_size: int):
        self.base, self.collator, self.stored, self.batch_size = base, collator, stored, batch_size
        self.num_new = 0  # rows of which no vector was kept
        self._key = sha256_hex(canonical_json(base_key(base)))
        self._vectors: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._vectors)

    def __call__(self, rows: Sequence[Example]) -> np.ndarray:
        """Return the vectors of rows that ``fill`` was called with, [N, D] in float32."""
        return np.stack([self._vectors[self._key_of(row)] for row in rows])

    def fill(self, rows: Sequence[Example], accelerator: Accelerator) -> str | None:
        """Read the kept vectors of rows and compute the others, each process its share; every process has to call it.

        Returns:
            Why the vectors cannot be computed, the same on all processes; None if they are there.
        """
        problem, new = None, 0
        mine: dict[str, np.ndarray] = {}
        try:
            unique = {self._key_of(row): row for row in rows}
            share = [*unique.items()][accelerator.process_index :: accelerator.num_processes]
            mine = {key: _decoded(note) for key, note in Notes(_NOTES).get(key for key, _ in share).items()}
            missing = {key: row for key, row in share if key not in mine}
            new = len(missing)
            mine |= self._compute(missing)
        except Exception as error:  # the others wait for this process, and the run needs no vectors
            problem = f"{type(error).__name__}: {plain(str(error))}"
        found = gather_object([(problem, new, mine)])
        for _, count, vectors in found:
            self.num_new += count
            self._vectors |= vectors
        return next((text for text, _, _ in found if text), None)

    def _key_of(self, row: Example) -> str:
        return canonical_json([self._key, digests_of(row), asdict(row.image_options)]).decode()

    @torch.inference_mode()
    def _compute(self, rows: Mapping[str, Example]) -> dict[str, np.ndarray]:
        """Compute and return the vectors of rows, and keep them."""
        found: dict[str, np.ndarray] = {}
        fresh: dict[str, str] = {}
        with tqdm(total=len(rows), unit="row", desc="linear probe", leave=False, mininterval=1.0) as bar:
            for part in self._batches(rows):
                for (key, _), vector in zip(part, self._pooled([inputs for _, inputs in part]), strict=True):
                    found[key] = vector
                    fresh[key] = base64.b64encode(vector.tobytes()).decode()
                bar.update(len(part))
                if len(fresh) >= _AT_ONCE:
                    Notes(_NOTES).put(fresh)
                    fresh = {}
        Notes(_NOTES).put(fresh)
        return found

    def _batches(self, rows: Mapping[str, Example]) -> Iterator[list[tuple[str, Inputs]]]:
        """Yield the inputs of rows, such that those of equal shapes are together.

        Each row is processed alone, because a processor may treat an image beside others in another way.
        """
        waiting: dict[Any, list[tuple[str, Inputs]]] = {}
        collator = self._collator(next(iter(rows.values()))) if rows else self.collator
        for key, row in rows.items():
            inputs = collator.prompt_batch([row]).inputs
            if not all(isinstance(value, Tensor) for value in inputs.values()):  # such as stored outputs
                yield [(key, inputs)]
                continue
            shape = tuple((name, tuple(value.shape)) for name, value in inputs.items())
            waiting.setdefault(shape, []).append((key, inputs))
            if len(waiting[shape]) == self.batch_size:
                yield waiting.pop(shape)
            elif sum(map(len, waiting.values())) == _WAITING * self.batch_size:
                yield waiting.pop(max(waiting, key=lambda one: len(waiting[one])))
        yield from waiting.values()

    def _collator(self, row: Example) -> TaskCollator:
        """Return the collator with stored outputs if they hold, for ``row``, all that the projector gets."""
        if self.stored is None:
            return self.collator
        stored = self.stored.prompt_batch([row]).inputs.get(STORED_OUTPUTS, {})
        (projector, *_) = self.base.towers.get("projector", ("",))
        # Where the projector's own outputs are stored, what it gets is hollow.
        below = projector and stored and not any(f"{path}.".startswith(f"{projector}.") for path in stored)
        return self.stored if below else self.collator

    def _pooled(self, rows: Sequence[Inputs]) -> list[np.ndarray]:
        """Return the vectors of rows whose inputs have equal shapes, in halves if they do not fit or do not divide."""
        try:
            features = self._features(_joined(rows))
        except RuntimeError as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
            features = None
        if features is None or features.numel() % (len(rows) * features.shape[-1]):
            half = len(rows) // 2
            return [*self._pooled(rows[:half]), *self._pooled(rows[half:])]
        means = features.float().reshape(len(rows), -1, features.shape[-1]).mean(dim=1)  # [B, D]
        if not bool(means.isfinite().all()):
            raise ModelError("the image features of the base must be finite, got infinite ones or none")
        return [np.ascontiguousarray(mean) for mean in means.cpu().numpy()]

    def _features(self, inputs: Inputs) -> Tensor:
        """Return the tokens of all images, [..., D], as the projector gets them.

        Raises:
            ModelError: the forward does not reach the projector, or gives it no tensor.
        """
        base, found = self.base, list[Tensor]()

        def take(tensors: Sequence[Any]) -> None:
            found.extend([one for one in tensors if isinstance(one, Tensor) and one.is_floating_point()][:1])
            raise _Taken

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            # A projector with queries of its own gets the image under this name of transformers.
            take([kwargs.get("encoder_hidden_states"), *args, *kwargs.values()])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            value = output if isinstance(output, Tensor) else output[0]
            take([value.flatten(2).transpose(1, 2) if value.ndim == 4 else value])  # [B, D, H, W] -> [B, H * W, D]

        if paths := base.towers.get("projector"):
            handle = base.model.get_submodule(paths[0]).register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = base.model.get_submodule(base.towers["vision"][-1]).register_forward_hook(after)
        try:
            batch = Batch(dict(inputs), []).to(base.model.device, base.model.dtype)
            base.family.outputs(base.model, batch.inputs)
        except _Taken:
            pass
        finally:
            handle.remove()
        if not found:
            raise ModelError(f"{type(base.model).__name__} must give image features to its projector, and gives none")
        return found[0]


class _Taken(Exception):  # noqa: N818
    """The end of a forward, at the projector."""


def _joined(rows: Sequence[Inputs]) -> Inputs:
    return rows[0] if len(rows) == 1 else {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _decoded(note: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(note), np.float32)

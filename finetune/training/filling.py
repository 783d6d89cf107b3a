"""Filling a feature store before the first step, by all processes of a run together."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from finetune.cache import Notes
from finetune.data.images import image_digest
from finetune.training.feature_store import StoredFeatures, is_whole, make_room, row_key
from finetune.training.memory import any_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from PIL.Image import Image

    from finetune.example import Example
    from finetune.interfaces import PictureFeatures
    from finetune.training.feature_store import FeatureStore

_NOTES = "pixels.sqlite"  # what a picture is remembered by -> the digest of its pixels
_Keys = tuple[str, ...]  # of the pictures of a row


@dataclass(frozen=True, kw_only=True)
class Filler:
    """Fills a store with what the rows of a run need; which files these are depends on pixels, not on their places.

    Args:
        store: where features go.
        open_pictures: returns the pictures of a row, decoded.
        compute: returns what the tower makes of them.
        max_bytes: that all features on this machine may take.
        accelerator: of the run.
        say: is told what was done.
    """

    store: FeatureStore
    open_pictures: Callable[[Example], list[Image]]
    compute: Callable[[list[Image]], PictureFeatures]
    max_bytes: int
    accelerator: Accelerator
    say: Callable[[str], None]

    def fill(self, rows: Iterable[Example]) -> StoredFeatures | str:
        """Makes sure that the features of all rows' pictures are stored; every process has to call it.

        Features that are there are read through once: one of which a byte has changed is made anew.

        Returns:
            The features, or why they cannot be stored, the same on all processes.

        Raises:
            RowError: a picture cannot be opened.
        """
        work = {row_key(row.images): row for row in rows if row.images}
        notes = Notes(_NOTES)
        digests = notes.get({key for keys in work for key in keys})
        started = time.monotonic()
        made, written, problem = self._share(
            work, digests, self.accelerator.process_index, self.accelerator.num_processes
        )
        digests.update(gather_object(list(digests.items())))
        notes.put(digests)
        if problem is None and any(not self._path(keys, digests).exists() for keys in work):  # another host's disk
            local, processes = (self.accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            more, bytes_more, problem = self._share(work, digests, local, processes)
            made, written = made + more, written + bytes_more
        self.accelerator.wait_for_everyone()
        if any_process(self.accelerator, problem is not None):
            return next(text for text in gather_object([problem]) if text)
        made, written = (sum(part) for part in zip(*gather_object([(made, written)]), strict=True))
        seconds = time.monotonic() - started
        self.say(
            f"feature store: the pictures of {len(work)} rows, {made} of them new "
            f"({written / 1e6:.1f} MB, {made / seconds:.1f} rows/s, {seconds:.1f} s), in {self.store.folder}"
        )
        return StoredFeatures({keys: self._path(keys, digests) for keys in work})

    def _share(
        self, work: dict[_Keys, Example], digests: dict[str, str], index: int, count: int
    ) -> tuple[int, int, str | None]:
        """Stores what one of ``count`` processes has to; returns how many rows, the bytes, and what went wrong."""
        mine = list(work.items())[index::count]
        made = written = 0
        try:
            with tqdm(total=len(mine), unit="row", desc="storing features", disable=index != 0, leave=False) as bar:
                for number, (keys, row) in enumerate(mine):
                    if not self._is_stored(keys, digests):
                        images = self.open_pictures(row)
                        digests |= {key: _digest(image) for key, image in zip(keys, images, strict=True)}
                    if not self._is_stored(keys, digests):  # nor under another name
                        features = self.compute(images)
                        if made == 0 and (problem := self._no_room(features, mine[number:], digests)):
                            return made, written, problem
                        written += self.store.put(self._path(keys, digests), features)
                        made += 1
                    bar.update()
        except OSError as error:
            return made, written, f"{self.store.folder} cannot be written ({error.strerror})"
        return made, written, None

    def _is_stored(self, keys: _Keys, digests: dict[str, str]) -> bool:
        return all(key in digests for key in keys) and is_whole(self._path(keys, digests))

    def _no_room(
        self, first: PictureFeatures, left: Sequence[tuple[_Keys, Example]], digests: dict[str, str]
    ) -> str | None:
        """Makes room for the rest, as large as its first; returns what is in the way."""
        known = [self._path(keys, digests) for keys, _ in left if all(key in digests for key in keys)]
        wanted = first.nbytes * (len(left) - sum(path.exists() for path in known))
        if make_room(wanted, max_bytes=self.max_bytes, keep=known):
            return None
        return (
            f"{wanted / 1e9:.1f} GB are wanted, more than the disk of {self.store.folder} or "
            f"train.feature_store_max_bytes ({self.max_bytes:,}, with what is kept there) leaves"
        )

    def _path(self, keys: _Keys, digests: dict[str, str]) -> Path:
        return self.store.path([digests[key] for key in keys])


def _digest(image: Image) -> str:
    return image_digest(np.asarray(image))

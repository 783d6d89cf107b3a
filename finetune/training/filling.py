"""Precomputing the features of a run before its first step, on all of its processes."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from finetune.core.cache import Notes
from finetune.data.image_checks import may_be_noted, source_key
from finetune.data.images import image_digest
from finetune.errors import FinetuneError, ModelError, TrainingError
from finetune.training.feature_store import is_whole, make_room
from finetune.training.memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from PIL.Image import Image

    from finetune.core.batch import Features
    from finetune.core.example import Example
    from finetune.training.feature_store import FeatureStore

_NOTES = "pixels.sqlite"  # key of an image -> digest of its pixels


@dataclass(frozen=True, kw_only=True)
class Content:
    """The part of a row that features are computed from: its images, or its images and its text.

    Attributes:
        title: the name of the features in the log.
        key: the function that returns the key of that part within a run; rows with the same key share their features.
        texts: the function that returns all of a row, beside its images, that the features depend on.
        compute: the function that returns the features of a row with its opened images.
        needs_images: whether ``compute`` reads the opened images; if not, it gets none.
        has_features: the function that returns whether a row has features.
    """

    title: str
    key: Callable[[Example], Hashable]
    texts: Callable[[Example], tuple[str, ...]]
    compute: Callable[[Example, list[Image]], Features]
    needs_images: bool
    has_features: Callable[[Example], bool]


@dataclass(frozen=True, kw_only=True)
class Filler:
    """A filler of a feature store for the rows of a run; the name of a file depends on pixels, not on paths.

    Args:
        store: the store of the features.
        content: the part of a row that the features are computed from.
        open_images: the function that returns the decoded images of a row.
        max_bytes: the largest number of bytes of all features on this machine.
        accelerator: the accelerator of the run.
        log: the function that prints a line about the work.
    """

    store: FeatureStore
    content: Content
    open_images: Callable[[Example], list[Image]]
    max_bytes: int
    accelerator: Accelerator
    log: Callable[[str], None]

    def fill(
        self,
        rows: Iterable[Example],
        *,
        first: Sequence[Example] = (),
        check: Callable[[dict[Hashable, Path]], str | None] = lambda paths: None,
    ) -> dict[Hashable, Path] | str:
        """Store the features of all rows, unless they are stored; every process has to call it.

        Stored features are read once, and those with a changed byte are computed again.

        Args:
            rows: the rows.
            first: the rows among them that are stored before the others.
            check: the function that gets the files of these rows, and returns why no others are to be stored.

        Returns:
            The key of each row's content -> the file of its features; or the reason why they cannot be stored, the
            same on all processes.

        Raises:
            FinetuneError: one process cannot open an image; every process raises.
        """
        content = self.content
        unique = {content.key(row): row for row in [*first, *rows] if content.has_features(row)}
        work = [_Work.of(row, key=key, texts=content.texts(row)) for key, row in unique.items()]
        digests = Notes(_NOTES).get({key for one in work for key in one.keys})
        num_first = len({content.key(row) for row in first})
        started = time.monotonic()
        shares: list[_Share] = []
        problem = self._store_everywhere(shares, work[:num_first], digests)
        if problem is None and num_first:
            problem = check({one.content_key: self.path(one, digests) for one in work[:num_first]})
        problem = problem or self._store_everywhere(shares, work[num_first:], digests)
        if problem is not None:
            return problem
        sizes = gather_object([size for share in shares for size in share.sizes])
        seconds = time.monotonic() - started
        self.log(
            f"feature store: {content.title} {len(work)} rows, {len(sizes)} of them new "
            f"({sum(sizes) / 1e6:.1f} MB, {len(sizes) / seconds:.1f} rows/s, {seconds:.1f} s), in {self.store.folder}"
        )
        return {one.content_key: self.path(one, digests) for one in work}

    def _store_everywhere(self, shares: list[_Share], work: Sequence[_Work], digests: dict[str, str]) -> str | None:
        """Store features on the disks of all processes, and return the obstacle, if any."""
        shares += [_Share(self, digests) for _ in range(2)]
        mine, local = shares[-2:]
        problem = self._store_on_all(mine, work, self.accelerator.process_index, self.accelerator.num_processes)
        if problem is not None:
            return problem
        # Processes on another host may have stored features on a disk of their own, from images with other keys.
        missing = [one for one in work if not self.is_there(one, digests)]
        self.accelerator.wait_for_everyone()  # no process may write before all have listed what is missing
        index = self.accelerator.local_process_index
        return self._store_on_all(local, missing, index, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def path(self, work: _Work, digests: dict[str, str]) -> Path:
        """Return the path of the features of a row, whether or not they are stored."""
        return self.store.path([*(digests[key] for key in work.keys), *work.texts])

    def is_there(self, work: _Work, digests: dict[str, str]) -> bool:
        """Return whether features are stored, without a check of their bytes."""
        return all(key in digests for key in work.keys) and self.path(work, digests).exists()

    def _store_on_all(self, share: _Share, work: Sequence[_Work], index: int, count: int) -> str | None:
        """Store one share on every process, and gather the digests and the errors of all of them."""
        problem, error = None, None
        try:
            problem = share.store(work[index::count], show=index == 0, sharers=count)
        except FinetuneError as raised:
            error = raised
        results = gather_object([(share.found, problem, str(error) if error else None)])
        for found, _, _ in results:
            share.digests.update(found)
        lasting = {key for one in work for key in one.lasting}
        Notes(_NOTES).put({key: digest for key, digest in share.found.items() if key in lasting})
        if error:
            raise error
        for process, (_, _, message) in enumerate(results):
            if message:
                raise TrainingError(f"process {process}: {message}")
        return next((text for _, text, _ in results if text), None)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A row whose features are stored."""

    row: Example
    content_key: Hashable
    keys: tuple[str, ...]  # the key of each image in the notes
    lasting: tuple[str, ...]  # the keys that may be kept in the notes after the run
    texts: tuple[str, ...]

    @classmethod
    def of(cls, row: Example, *, key: Hashable, texts: tuple[str, ...]) -> _Work:
        keys = tuple(source_key(source, row.image_options) for source in row.images)
        lasting = tuple(key for key, source in zip(keys, row.images, strict=True) if may_be_noted(source))
        return cls(row=row, content_key=key, keys=keys, lasting=lasting, texts=texts)


class _Share:
    """The share of the work that one process does."""

    def __init__(self, filler: Filler, digests: dict[str, str]):
        self.filler, self.digests = filler, digests
        self.found: dict[str, str] = {}  # digests of images that were unknown before
        self.sizes: list[int] = []  # bytes of each row's new features

    def store(self, mine: Sequence[_Work], *, show: bool, sharers: int) -> str | None:
        """Store the missing features, and return the obstacle, if any.

        Args:
            mine: the rows of this process.
            show: whether to show a progress bar.
            sharers: the number of processes that share the disk.

        Raises:
            FinetuneError: an image cannot be opened.
        """
        filler, digests = self.filler, self.digests
        try:
            with tqdm(total=len(mine), unit="row", desc="storing features", disable=not show, leave=False) as bar:
                for number, work in enumerate(mine):
                    if not self._is_whole(work):
                        images = self._images(work)
                        if not self._is_whole(work):  # a file of the same pixels may exist under another key
                            features = filler.content.compute(work.row, images)
                            self.sizes.append(filler.store.put(filler.path(work, digests), features))
                            if problem := self._no_room(mine[number + 1 :], sharers):
                                return problem
                    bar.update()
        except ModelError as error:
            return str(error)
        except OSError as error:
            return f"{filler.store.folder} cannot be written ({error.strerror})"
        except RuntimeError as error:
            if isinstance(error, FinetuneError) or not is_out_of_memory(error):
                raise
            return "the device has too little memory for the tower"
        return None

    def _images(self, work: _Work) -> list[Image]:
        """Return a row's images, and note their digests; return none if nothing needs them."""
        if not self.filler.content.needs_images and all(key in self.digests for key in work.keys):
            return []
        images = self.filler.open_images(work.row)
        fresh = [image_digest(np.asarray(image)) for image in images]
        self.found.update(zip(work.keys, fresh, strict=True))
        self.digests.update(zip(work.keys, fresh, strict=True))
        return images

    def _is_whole(self, work: _Work) -> bool:
        return all(key in self.digests for key in work.keys) and is_whole(self.filler.path(work, self.digests))

    def _no_room(self, left: Sequence[_Work], sharers: int) -> str | None:
        """Make room for the rows that are left, by the median size so far; return the obstacle, if any.

        The check runs only after 4, 8, 16, ... rows, each time with a better estimate.
        """
        made = len(self.sizes)
        if made < 4 or made & (made - 1):
            return None
        filler = self.filler
        rest = [work for work in left if not filler.is_there(work, self.digests)]
        wanted = int(statistics.median(self.sizes)) * len(rest) * sharers
        if make_room(wanted, max_bytes=filler.max_bytes):
            return None
        return (
            f"{wanted / 1e9:.1f} GB are needed, but the disk of {filler.store.folder} or "
            f"train.feature_store_max_bytes ({filler.max_bytes:,}, stored features included) leaves less"
        )

"""Opening a stream: its files and their versions are known before any row is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.core import lfs
from finetune.core.cache import conversions_of
from finetune.data.arrow import parquet_files
from finetune.data.hub import hub_builder, hub_faults
from finetune.data.stream import Checks, Stream
from finetune.errors import DataError
from finetune.recipe import HubData, ParquetData

if TYPE_CHECKING:
    from finetune.data.bad_rows import BadRows
    from finetune.interfaces import RowLengths
    from finetune.recipe import TaskSection


def open_stream(
    section: HubData | ParquetData,
    *,
    task: TaskSection,
    seed: int,
    bad: BadRows,
    lengths: RowLengths | None = None,
    limit: int | None = None,
) -> Stream:
    """Open the train rows of a source and check the first of them.

    Args:
        section: the recipe's data section.
        task: the section of the task that puts the questions.
        seed: the seed of the order, and of the choice among captions.
        bad: the record of the rows that cannot be used.
        lengths: the counter of the base that the rows are for.
        limit: the largest number of tokens of a row; None for no bound.

    Raises:
        DataError: if the source cannot be read, or one of its first rows cannot be used.
    """
    import pyarrow
    from datasets import load_dataset_builder

    root = Path(section.root or ".")
    if isinstance(section, HubData):
        what, split = f"{section.name} {section.train}", section.train
        with hub_faults(section, "train"):
            builder = hub_builder(section)
            dataset = builder.as_streaming_dataset(split=split)
    else:
        what, split = f"{root}/{section.train}", "train"
        paths = parquet_files(section, "train")
        if pointer := next((path for path in paths if lfs.is_pointer_file(path)), None):
            raise DataError(f"{pointer}: {lfs.WAY_OUT}")
        data_files = {split: [str(path) for path in paths]}
        try:
            builder = load_dataset_builder("parquet", data_files=data_files, cache_dir=str(conversions_of(paths)))
            dataset = builder.as_streaming_dataset(split=split)
        except (OSError, pyarrow.ArrowException) as error:
            cause = str(error).splitlines()[0].rstrip(".")
            fault = f"not readable Parquet files: {cause}. Write the files again, or fetch them again."
            raise DataError(f"{what}: {fault}") from None
    # datasets itself uses these as versions: the commit on the hub, the ETag of a server, the time of a file.
    found = (builder.config.data_files or {}).get(split)
    pairs = zip(found, found.origin_metadata, strict=True) if found is not None else ()
    files = [(Path(name).name, *version) for name, version in pairs]
    checks = Checks(section=section, task=task, root=root, seed=seed, lengths=lengths, limit=limit)
    return Stream(dataset, what, files=files, checks=checks, bad=bad)

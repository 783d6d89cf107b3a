"""Rows of a data set on the Hugging Face hub, or of a folder with its files."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.cache import cache_home, conversions_of
from finetune.data.arrow import table_examples
from finetune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset, DatasetBuilder

    from finetune.core.example import Example
    from finetune.data.bad_rows import BadRows
    from finetune.recipe import HubData, TaskSection


def read_hub(section: HubData, split: str, *, task: TaskSection, seed: int, bad: BadRows) -> list[Example]:
    """Read one split through ``datasets``; arguments as for ``read_jsonl``.

    Raises:
        DataError: if the data set, config or split does not exist, or is not on this machine.
    """
    from datasets import load_dataset

    name = getattr(section, split)
    with hub_faults(section, split):
        if section.streaming:
            dataset = _one_split(section, name)
        else:
            dataset = load_dataset(**_place(section), split=name)

    def place(row: int) -> tuple[str, str]:
        return f"{name}:{row}", f"{section.name} {name}, row {row}"

    what = f"{section.name} {name}"
    return table_examples(dataset, section, place, what=what, task=task, root=Path(section.root or "."), bad=bad)


def hub_builder(section: HubData) -> DatasetBuilder:
    """Return the builder that knows the files of a data set; call this inside ``hub_faults``."""
    from datasets import load_dataset_builder

    return load_dataset_builder(**_place(section))


def _place(section: HubData) -> dict[str, Any]:
    if section.root is None:
        return {"path": section.name, "name": section.config, "revision": section.revision}
    if not Path(section.root).is_dir():
        raise DataError(
            f"data.root must be a folder with the files of {section.name}, got {section.root}, which is no folder. "
            "Correct data.root."
        )
    root = Path(section.root)
    # Hidden files, such as those of git and of `hf download`, do not belong to a data set and change without it.
    names = (path for path in root.rglob("*") if not any(p.startswith(".") for p in path.relative_to(root).parts))
    files = [path for path in names if path.is_file()]
    return {"path": section.root, "name": section.config, "cache_dir": str(conversions_of(files))}


@contextmanager
def hub_faults(section: HubData, split: str) -> Iterator[None]:
    """Turn an error of ``datasets`` inside the block into a DataError with advice."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        yield
    except (ConnectionError, DatasetNotFoundError) as error:
        fault = f"the data set must be on this machine or on a hub that it reaches: {_first_line(error)}"
        raise DataError(f"{section.name}: {fault}\n{_how_to_bring(section)}") from None
    except DataError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{section.root or section.name}: the data set cannot be loaded: "
            f"{_first_line(error.__cause__ or error).rstrip('.')}. Check data.{split}={getattr(section, split)} and "
            f"data.config={section.config}."
        ) from None


def _one_split(section: HubData, name: str) -> Dataset:
    """Download one split and keep it; other splits, which may be too large to keep, are not downloaded."""
    from datasets import Dataset, load_dataset_builder
    from datasets.fingerprint import Hasher

    where = _place(section)
    builder = load_dataset_builder(**where)
    rows = builder.as_streaming_dataset(split=name).decode(False)
    return Dataset.from_generator(
        rows.__iter__,
        features=rows.features,
        cache_dir=where.get("cache_dir") or str(cache_home() / "datasets"),
        fingerprint=Hasher.hash([builder.hash, name]),
    )


def _how_to_bring(section: HubData) -> str:
    revision = f" --revision {section.revision}" if section.revision else ""
    return (
        "On a machine that reaches the hub, run\n"
        f"  hf download {section.name} --repo-type dataset{revision} --local-dir FOLDER\n"
        "For a gated data set, first accept its terms and run `hf auth login`. Copy FOLDER to this machine, and set "
        "data.root=FOLDER."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

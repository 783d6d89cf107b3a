"""Rows of a data set of the Hugging Face hub, or of a folder with its files."""

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
    """Read one split through ``datasets``; arguments as ``read_jsonl``.

    Raises:
        DataError: there is no such data set, config or split, or it is not on this machine; with what to do.
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
        raise DataError(f"data.root={section.root}: no such folder. It must hold the files of {section.name}.")
    root = Path(section.root)
    # Hidden files, as those of git and of `hf download`, are no part of a data set, and change when it does not.
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
        raise DataError(f"{section.name}: {_first_line(error)}\n{_how_to_bring(section)}") from None
    except DataError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{section.root or section.name}: cannot be loaded: {_first_line(error.__cause__ or error)} Look at "
            f"data.{split}={getattr(section, split)} and data.config={section.config}."
        ) from None


def _one_split(section: HubData, name: str) -> Dataset:
    """Bring and keep one split; the others, too large to keep, are left where they are."""
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
        "The data set is not on this machine and could not be fetched. Where the hub can be reached, run\n"
        f"  hf download {section.name} --repo-type dataset{revision} --local-dir FOLDER\n"
        "(after `hf auth login` and accepting its terms, where it is gated), bring FOLDER here, and set "
        "data.root=FOLDER."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

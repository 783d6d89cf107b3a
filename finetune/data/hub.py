"""Rows of a data set of the Hugging Face hub, or of a folder with its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cache import cache_home
from finetune.data.arrow import table_examples
from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.data.bad_rows import BadRows
    from finetune.example import Example
    from finetune.recipe import HubData, TaskSection


def read_hub(section: HubData, split: str, *, task: TaskSection, seed: int, bad: BadRows) -> list[Example]:
    """Reads one split through ``datasets.load_dataset``; arguments as ``read_jsonl``.

    Raises:
        DataError: there is no such data set, config or split, or it is not on this machine; with what to do.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    name = getattr(section, split)
    if section.root is not None and not Path(section.root).is_dir():
        raise DataError(f"data.root={section.root}: no such folder. It must hold the files of {section.name}.")
    try:
        if section.root is None:
            dataset = load_dataset(section.name, section.config, split=name, revision=section.revision)
        else:
            cache = str(cache_home() / "datasets")
            dataset = load_dataset(section.root, section.config, split=name, cache_dir=cache)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise DataError(f"{section.name}: {_first_line(error)}\n{_how_to_bring(section)}") from None
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{section.root or section.name}: cannot be loaded: {_first_line(error.__cause__ or error)} Look at "
            f"data.{split}={name} and data.config={section.config}."
        ) from None

    def place(row: int) -> tuple[str, str]:
        return f"{name}:{row}", f"{section.name} {name}, row {row}"

    what = f"{section.name} {name}"
    return table_examples(dataset, section, place, what=what, task=task, root=Path(section.root or "."), bad=bad)


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

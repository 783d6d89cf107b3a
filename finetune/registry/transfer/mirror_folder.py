"""The folder that a mirror writes."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.core.system_errors import explain
from finetune.errors import StoreError
from finetune.registry.storage.location import refuse_in_registry


@contextmanager
def new_folder(into: Path, *, elsewhere: str) -> Iterator[Path]:
    """Yield the path of a folder to make, which is renamed to ``into`` when no error is raised.

    Args:
        into: the folder to make, which must not exist or must be empty; missing parents are made too.
        elsewhere: the option that chooses another path, such as ``" (--into)"``.

    Raises:
        StoreError: the folder cannot be written, is not empty, or lies in a registry.
    """
    refuse_in_registry(into, elsewhere=elsewhere)
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mirror-", dir=into.parent) as work:
            yield Path(work, "new")
            if into.exists() and (not into.is_dir() or any(into.iterdir())):
                raise StoreError(f"{into} holds something already. Choose a folder that does not exist yet{elsewhere}.")
            os.rename(Path(work, "new"), into)
    except StoreError:  # an OSError too, and already explained
        raise
    except OSError as error:
        raise explain(error, into, verb="write", elsewhere=elsewhere) from error

"""Imports of large libraries without Python's garbage collection.

Each import of torch, transformers or PEFT makes a million objects, which stay. Collections that look for garbage among
them take a sixth of the time of the imports, and the one at the end of the process a fifth of a whole short command.
"""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def quick_imports() -> Iterator[None]:
    """Pause garbage collection in a block that imports, and exempt the present objects from later collections.

    Garbage among these objects would stay to the end of the process, so only a command uses this, as it starts. A block
    that imports nothing new exempts nothing.
    """
    if not gc.isenabled():
        yield
        return
    modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        gc.enable()

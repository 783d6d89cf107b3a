"""What an adapter must not touch, looked at before and after it was offered."""

import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.serving.vision_language_model import VisionLanguageModel

MAX_SECONDS = 2.0  # of CPU, which other processes of a busy machine do not use up
ROOM_BYTES = 64 * 2**20  # beside twice the size of the adapter: for what Python and torch keep
MAX_MESSAGE = 1500
# A registry is not looked into: it remembers which names it was asked for.
_OURS = tuple(f"finetune.{room}" for room in ("adapters", "build", "data", "families", "methods", "serving"))
_HANGS_SECONDS = 60  # of wall clock: longer than any of this takes on a busy machine


@dataclass
class Stage:
    """A base with a neighbour loaded and active, and good adapters to change.

    Attributes:
        vlm: the base.
        base: its folder.
        neighbour: the folder of the adapter that is loaded.
        good: folders of adapters that load, by name.
        is_whole: whether the last case showed that it left all as it was.
    """

    vlm: VisionLanguageModel
    base: Path
    neighbour: Path
    good: dict[str, Path]
    is_whole: bool = True
    state: dict[str, torch.Tensor] = field(init=False)
    answers: dict[str, torch.Tensor] = field(init=False)
    census: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        self.vlm.use(self.neighbour)
        self.answers = {}
        for name, folder in self.good.items():
            with self.vlm.using(folder):
                self.answers[name] = self.answer()
            self.vlm.remove(folder)
        self.state = {name: tensor.clone() for name, tensor in _tensors(self.vlm)}
        self.census = census(self.vlm)
        self.answers["neighbour"] = self.answer()
        with self.vlm.using(None):
            self.answers["base"] = self.answer()

    def answer(self) -> torch.Tensor:
        """What the base makes of the probe with the adapter that is active."""
        places = self.vlm.adapter.placeholders if self.vlm.adapter else None
        return self.vlm.base.probe(0, places)

    def check_untouched(self) -> None:
        """Base and neighbour are what they were, bit for bit, and there is no ghost of another adapter."""
        active = self.vlm.adapter
        assert active and active.ref == str(self.neighbour), "another adapter became active"
        state = dict(_tensors(self.vlm))
        assert state.keys() == self.state.keys(), f"tensors came or went: {state.keys() ^ self.state.keys()}"
        changed = [name for name, tensor in state.items() if not torch.equal(tensor, self.state[name])]
        assert not changed, f"changed: {changed[:3]}"
        now = census(self.vlm)
        ghosts = [path for path in now.keys() | self.census.keys() if now.get(path) != self.census.get(path)]
        assert not ghosts, f"a ghost at {sorted(ghosts)[:3]}"
        assert torch.equal(self.answer(), self.answers["neighbour"]), "the neighbour answers otherwise"
        with self.vlm.using(None):
            assert torch.equal(self.answer(), self.answers["base"]), "the base answers otherwise"

    def check_next(self, name: str) -> None:
        """A good adapter loads and answers as it did, and can be taken out again."""
        with self.vlm.using(self.good[name]):
            loaded = self.vlm.adapter
            assert loaded and loaded.probe.verdict == "passed"
            assert torch.equal(self.answer(), self.answers[name]), "the next good adapter answers otherwise"
        self.vlm.remove(loaded)

    @contextmanager
    def unharmed(self, folder: Path, canary: Path) -> Iterator[None]:
        """Bounds the block, then looks at everything."""
        self.is_whole = False
        with bounded(folder, canary):
            yield
        self.check_untouched()
        self.check_next("lora")
        self.is_whole = True


@contextmanager
def bounded(folder: Path, canary: Path) -> Iterator[None]:
    """Asserts that the block takes little time and memory, and executes nothing.

    Args:
        folder: of what is offered; memory may grow by ``ROOM_BYTES`` and twice its size.
        canary: a file that appears when a payload was executed.
    """
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0
    max_bytes = 2 * size + ROOM_BYTES

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"hangs: more than {_HANGS_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_HANGS_SECONDS)
    _forget_peak()
    peak, start = _peak(), time.process_time()
    try:
        yield
    finally:
        seconds, grown = time.process_time() - start, _peak() - peak
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not canary.exists(), "something was executed"
    assert seconds <= MAX_SECONDS, f"took {seconds:.1f} s of CPU"
    assert grown <= max_bytes, f"memory grew by {grown} bytes; at most {max_bytes} may be"


def _forget_peak() -> None:
    """Let the peak be counted anew; where that cannot be, a smaller one than an earlier is not seen."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    """The most memory, in bytes, that this process ever held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _tensors(vlm: VisionLanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from vlm.model.named_parameters(remove_duplicate=False)
    yield from vlm.model.named_buffers(remove_duplicate=False)
    for loaded in vlm.switcher.loaded_adapters:
        for name, update in loaded.updates.items():
            yield from ((f"{loaded.ref}: {name}.{k}", v) for k, v in vars(update).items() if torch.is_tensor(v))


def census(vlm: VisionLanguageModel) -> dict[str, object]:
    """Count what is kept anywhere below a model: path -> what stands there, and how much it holds.

    It knows nothing of how adapters are kept: whatever table, hook, layer or module one leaves behind changes a count.
    """
    found: dict[str, object] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("vlm", vlm)]
    while todo:
        path, thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict | list | tuple | set):
            found[path] = len(thing)
            items = thing.items() if isinstance(thing, dict) else enumerate(thing)
            # An id among the keys differs from one time to the next.
            todo += [(f"{path}.{n if isinstance(key, int) else key}", v) for n, (key, v) in enumerate(items)]
        elif isinstance(thing, nn.Module) or type(thing).__module__.startswith(_OURS):
            attributes = getattr(thing, "__dict__", {})
            found[path] = (type(thing).__name__, len(attributes))
            todo += [(f"{path}.{key}", value) for key, value in attributes.items()]
        elif callable(thing):  # what stands in the place of a forward
            found[path] = type(thing).__name__
    return found

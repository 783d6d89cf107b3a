"""Targets for tests of the room itself."""

from dataclasses import dataclass

from finetune.errors import ExportError
from finetune.export.target import Comparison

SEEN = []  # what it was given, in order


@dataclass(frozen=True, kw_only=True)
class Fake:
    """Writes two files, and says of them what it was told."""

    verdicts: tuple = ("passed",)
    reason: str | None = None

    def refuse(self, manifest):
        SEEN.append(manifest.full_name)
        if self.reason:
            raise ExportError(self.reason)

    def make(self, source, folder):
        SEEN.append(source)
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("b")
        (folder / "a").write_text("aa")
        return [
            Comparison(what=f"thing {i}", verdict=verdict, largest_difference=0.5, tolerance=0.25)
            for i, verdict in enumerate(self.verdicts)
        ]

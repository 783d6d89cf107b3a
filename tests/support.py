"""docs/support.md, made from the code's tables and what the whole product of families and methods really did.

python -m tests.support        runs every cell and writes the table
"""

import tempfile
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.tables import FAMILIES as KNOWN
from tests.matrix import METHODS, UNMERGED, reload_cell, task_of, train_cell
from tests.tiny import FAMILIES

FILE = Path(__file__).parents[1] / "docs" / "support.md"
QUANTIZATIONS = (None, "4bit", "8bit")
# (family or method, method or quantization) that are refused with a reason.
REFUSED = {("gemma3", "lora-projector"), ("fast_vlm", "lora-vision"), ("dora", "8bit")}
REFUSED |= {("clip", method) for method in UNMERGED}  # a dual encoder takes no prompt
Verdicts = dict[tuple[str, str, str | None], bool]

_HEAD = """# What works with what

Made by `python -m tests.support`: on a tiny random model of each real class, with its real processor, every method was
attached, trained three steps (the loss falls), saved, loaded again (equal logits), merged where it can be (equal
within 1e-5), and removed (the base bit-equal). A cell names the bases it passed on: **32** full precision, **8** and
**4** bit by bitsandbytes; — is refused with the reason.

The tiny FastVLM has a MobileNetV2 tower, which has no linear module; a tower that has some can carry LoRA.
Any other class of `AutoModelForImageTextToText` is tried by the names transformers gives its towers.
"""


def support_table(verdicts: Verdicts) -> str:
    """The whole file."""
    lines = [_HEAD, f"| family | task | {' | '.join(METHODS)} |", f"|---|---|{'---|' * len(METHODS)}"]
    for family in sorted(KNOWN):
        cells = []
        for method in METHODS:
            passed = [q[0] if q else "32" for q in QUANTIZATIONS if verdicts[family, method, q]]
            cells.append(" ".join(passed) or "—")
        lines.append(f"| `{family}` | `{task_of(family)}` | {' | '.join(cells)} |")
    lines += ["", f"Not merged, as a prompt stands in the rows: {', '.join(sorted(UNMERGED))}.", ""]
    return "\n".join(lines)


def read_table() -> str:
    """The file as it stands."""
    return FILE.read_text(encoding="utf-8")


def main() -> None:
    """Run every cell, each reloaded in this process, and write the file."""
    verdicts: Verdicts = {}
    with tempfile.TemporaryDirectory() as name:
        for family, save in FAMILIES.items():
            base = save(Path(name) / "bases" / family)
            for method, section in METHODS.items():
                for quantization in QUANTIZATIONS:
                    folder = Path(name) / family / f"{method}-{quantization}"
                    folder.mkdir(parents=True)
                    key = (family, method, quantization)
                    try:
                        found = reload_cell(train_cell(base, section, folder, quantization=quantization))
                        verdicts[key] = bool(found["reloaded"]) and found.get("merged_off", 0) < 1e-5
                    except FinetuneError as error:
                        print(*key, error)
                        verdicts[key] = False
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(support_table(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()

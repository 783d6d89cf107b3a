"""The one dated file of benchmarks/gpu.sh: what each part found, or how it ended.

python -m benchmarks.gpu_results FOLDER --device cuda --part PART --exit-code N
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

_LAST = 2000  # characters of a failed part's log


def main(arguments: list[str] | None = None) -> int:
    """Add one part to the file, which begins with the machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_results", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with PART.json and PART.log")
    parser.add_argument("--device", required=True, help="device of the parts")
    parser.add_argument("--part", required=True, help="part that ended")
    parser.add_argument("--exit-code", type=int, required=True, help="exit code of the part")
    options = parser.parse_args(arguments)
    file = options.folder / f"{time.strftime('%Y-%m-%d')}-gpu.json"
    whole = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"details": _machine(options.device)}
    whole[options.part] = _part(options.folder, options.part, options.exit_code)
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


def _part(folder: Path, part: str, code: int) -> dict[str, Any]:
    if code == 0:
        found: dict[str, Any] = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
        return found
    log = folder / f"{part}.log"
    said = log.read_text(encoding="utf-8", errors="replace")[-_LAST:] if log.exists() else ""
    why = "took too long" if code in (124, 137) else f"exit code {code}"
    return {"failed": why, "log": said}


def _machine(device: str) -> dict[str, Any]:
    """Return machine and versions; a part may fail where torch cannot be imported, and the file is written then too."""
    try:
        import torch

        from benchmarks.results import machine

        found = {"device": device, "machine": machine(torch.device(device))}
        return found | ({"capability": torch.cuda.get_device_capability()} if device == "cuda" else {})
    except Exception as error:
        return {"device": device, "machine": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())

"""vLLM's environment, which ``install_vllm.sh`` builds, and what is asked in it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def inside():
    """Returns a function: runs a script of ``inside/`` by vLLM's Python, JSON in and JSON out."""
    python = Path(os.environ.get("FINETUNE_VLLM") or HERE.parents[1] / ".vllm").absolute() / "bin" / "python"
    assert python.exists(), f"no vLLM at {python}: tests/vllm/install_vllm.sh builds it, FINETUNE_VLLM says where"

    def run(script, given, **environment):
        own = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **environment}
        done = subprocess.run(
            [python, HERE / "inside" / f"{script}.py"],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            env={**os.environ, **own},
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run

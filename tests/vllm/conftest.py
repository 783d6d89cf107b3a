"""vLLM's environment, which ``install_vllm.sh`` builds, and what is asked in it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def inside():
    """Return a function: runs a script of ``inside/`` by vLLM's Python, JSON in and JSON out."""
    given = os.environ.get("FINETUNE_VLLM")
    python = Path(given or HERE.parents[1] / ".vllm").absolute() / "bin" / "python"
    if not python.exists():
        assert not given, f"FINETUNE_VLLM says {given}, and there is no environment"
        pytest.skip("no environment with vLLM: tests/vllm/run.sh builds it")

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

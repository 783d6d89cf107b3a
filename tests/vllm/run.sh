#!/usr/bin/env bash
# Builds the environment where it is not there yet, and runs the tests marked `vllm` in both environments.
#
#   tests/vllm/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export FINETUNE_VLLM=${FINETUNE_VLLM:-.vllm}
tests/vllm/install_vllm.sh
date -u +%F
echo "$(nproc --all) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(uname -sr)"
"$FINETUNE_VLLM/bin/python" -c 'from importlib.metadata import version
print(*(f"{name} {version(name)}" for name in ("vllm", "torch", "transformers")), sep=", ")'
"${FINETUNE_VENV:-.venv}/bin/python" -m pytest -m vllm tests/vllm "$@"

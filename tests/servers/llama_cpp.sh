#!/usr/bin/env bash
# Runs the tests marked `llama_cpp` against llama.cpp itself, in an environment of its own that goes at the end.
#
#   tests/servers/llama_cpp.sh [pytest arguments]
#
# pip installs xllamacpp there, a build of llama.cpp with Python bindings, about 150 MB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${FINETUNE_VENV:-.venv}/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --only-binary :all: 'xllamacpp==2026.10.11549'
FINETUNE_LLAMA_CPP="$work/venv/bin/python" "$python" -m pytest -m llama_cpp tests/export "$@"

#!/usr/bin/env bash
# Builds the separate environment of the tests marked `vllm`: vLLM with all that it pins (about 12 GB, CUDA wheels that
# import without a GPU too), then this package's core, which may change nothing of it. Indexes are pip's own affair.
#
#   FINETUNE_VLLM        where it is built; .vllm beside launch.sh unless told
#   FINETUNE_VLLM_UNPIN  names of vLLM's requirements, separated by spaces, that may have any version: for an index that
#                        lacks the one asked for
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

version=0.33.0
environment=${FINETUNE_VLLM:-.vllm}
python=$environment/bin/python

[ -x "$python" ] || python3 -m venv "$environment"
installed=$("$python" -c 'from importlib.metadata import version; print(version("vllm"))' 2>/dev/null) || installed=
if [ "$installed" != "$version" ]; then
  wheel=$(mktemp -d)
  trap 'rm -rf "$wheel"' EXIT
  "$python" -m pip install --quiet --upgrade pip
  "$python" -m pip download --quiet --no-deps --dest "$wheel" "vllm==$version"
  "$python" - "$wheel"/vllm-*.whl ${FINETUNE_VLLM_UNPIN:-} >"$wheel/requirements.txt" <<'PYTHON'
import email, re, sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    for line in email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist"):
        if "extra ==" not in line:
            package = re.match(r"[\w.-]+", line)[0]
            print(package if package in sys.argv[2:] else line)
PYTHON
  "$python" -m pip install --quiet --requirement "$wheel/requirements.txt"
  "$python" -m pip install --quiet --no-deps "$wheel"/vllm-*.whl
fi

# What the package adds beside vLLM is fine, what it changes is not: neither a version nor what `pip check` says.
state() {
  "$python" -m pip freeze --exclude-editable | sort
  "$python" -m pip check || true
}
before=$(state)
"$python" -m pip install --quiet --editable .
lost=$(comm -23 <(echo "$before" | sort) <(state | sort))
if [ -n "$lost" ]; then
  printf 'installing finetune-vlm changed what vLLM %s had brought:\n%s\n' "$version" "$lost" >&2
  exit 1
fi
"$python" -m pip check || true

#!/usr/bin/env bash
# What one data-centre GPU does with this package, in at most 8 minutes and without network; the most telling part
# first, each by itself. A part that fails or takes too long says so, and the next one runs.
set -uo pipefail

usage() {
  cat <<'USAGE'
usage: benchmarks/gpu.sh [--dry-run] [--wheels DIR] [--out DIR] [--only PART,PART]

  --dry-run      run each part on the CPU with models of a few layers, in some minutes
  --wheels DIR   install into a new environment from the wheels in DIR; without it, use the python on PATH
  --out DIR      folder of the results: DATE-gpu.json, and the log of each part (gpu-results)
  --only PARTS   parts to run, of: qwen smolvlm use quantized attention compiled fsdp2 marked

DIR comes from a machine with network and the same Python:
  pip download -d DIR -c constraints.txt '.[dev,bench]' setuptools wheel
USAGE
}

# Each part and its largest number of seconds; with the install, 480 in all.
parts='qwen:110 smolvlm:80 use:60 quantized:35 attention:35 compiled:30 fsdp2:25 marked:25'
install_seconds=80 total_seconds=480

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
device=cuda wheels='' out=gpu-results only=''
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) device=cpu ;;
    --wheels | --out | --only)
      [ $# -ge 2 ] || { printf 'error: %s needs a value\n' "$1" >&2 && exit 2; }
      case $1 in --wheels) wheels=$2 ;; --out) out=$2 ;; --only) only=,$2, ;; esac
      shift ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
  esac
  shift
done
mkdir -p "$out" && out=$(cd "$out" && pwd -P) || exit 2
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd -P) || exit 2
cd "$root" || exit 2
python=${PYTHON:-python3}
began=$SECONDS

say() { printf 'gpu: %s\n' "$*" | tee -a "$out/gpu.log"; }

if [ -n "$wheels" ]; then
  say "installing from $wheels"
  "$python" -m venv "$out/venv" && python=$out/venv/bin/python &&
    timeout "$install_seconds" "$python" -m pip install -q --no-index --find-links "$wheels" -c constraints.txt \
      -e '.[dev,bench]' --no-build-isolation >"$out/install.log" 2>&1 ||
    { say "the install failed: see $out/install.log" && exit 1; }
fi

export PYTHONPATH=$root HF_HUB_OFFLINE=1
status=0
for entry in $parts; do
  part=${entry%:*} seconds=${entry#*:}
  case $only in '' | *",$part,"*) ;; *) continue ;; esac
  left=$((total_seconds - (SECONDS - began)))
  if [ "$device" = cpu ]; then
    seconds=900
  elif [ "$left" -lt 10 ]; then
    say "$part: left out, no time is left"
    continue
  elif [ "$left" -lt "$seconds" ]; then
    seconds=$left
  fi
  started=$SECONDS code=0
  timeout -k 5 "$seconds" "$python" -m benchmarks.gpu "$part" --device "$device" --json "$out/$part.json" \
    >"$out/$part.log" 2>&1 || code=$?
  case $code in
    0) say "$part: done in $((SECONDS - started)) s" ;;
    124 | 137) say "$part: stopped after $seconds s" && status=1 ;;
    *) say "$part: failed with exit code $code: $(tail -n 1 "$out/$part.log")" && status=1 ;;
  esac
  # After each part, so that the results stand wherever the time ends.
  "$python" -m benchmarks.gpu_results "$out" --device "$device" --part "$part" --exit-code "$code"
done
say "results: $(ls "$out"/*-gpu.json 2>/dev/null | tail -n 1), after $((SECONDS - began)) s"
exit "$status"

#!/usr/bin/env bash
# Builds the Python environment if it is missing or out of date, then runs the command in it. Needs only
# bash 3.2, the version that macOS ships.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: ./launch.sh COMMAND

  setup                          build the environment, then show versions and hardware
  demo [--json FILE] [options]   train, publish and swap two adapters of the built-in model
  test [--all] [pytest args]     run the tests; --all adds the slow ones
  CONFIG.yaml [key=value ...]    train this recipe on the hardware found

Each command first builds the environment if needed. Variables:

  PYTHON                 the Python (3.11 or later) to build the environment from
  NPROC                  number of processes to train with, or to test with
  STRATEGY               how GPUs share a run: ddp (each has the whole base; the default), fsdp2 (each has a shard),
                         deepspeed_zero2, deepspeed_zero3
  FINETUNE_VENV          folder of the environment; default: .venv beside this script
  FINETUNE_SKIP_INSTALL  1: use the environment unchanged (needs no network)
  FINETUNE_MIN_FREE_GB   free disk space that an install needs; default: 7 on Linux, 3 elsewhere
  ACCELERATE_USE_CPU     true: train on the CPU even where there is a GPU
  PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_CERT, HTTPS_PROXY, ...
                         read by pip: the index of packages, also for CPU-only builds of torch
USAGE
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=${FINETUNE_VENV:-$root/.venv}
case $venv in /* | [A-Za-z]:*) ;; *) venv=$PWD/$venv ;; esac
stamp=$venv/.launch-stamp
lock=$venv/.launch-lock
unfinished=$venv/.launch-unfinished
log=$venv/install.log
index="${PIP_INDEX_URL-}|${PIP_EXTRA_INDEX_URL-}|${PIP_FIND_LINKS-}|${PIP_NO_INDEX-}"
child=
locked=

say() { printf 'launch: %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$1" >&2
  shift
  [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
  exit 2
}

# --- the present environment ---------------------------------------------------------------------

find_venv_python() { # Sets venv_python; Windows has another path.
  for venv_python in "$venv/bin/python" "$venv/Scripts/python.exe"; do
    [ -x "$venv_python" ] && return 0
  done
  return 1
}

fingerprint() {
  # The folder is part of it because an editable install points into that folder: a copied or moved
  # checkout must not run the code of its original. -I -S limits this to some 20 ms.
  "$venv_python" -I -S -c 'import hashlib, sys
root, index = sys.argv[1:]
wanted = hashlib.sha256(repr((root, sys.version)).encode())
for name in ("pyproject.toml", "constraints.txt"):
    with open(root + "/" + name, "rb") as file:
        wanted.update(file.read())
print(wanted.hexdigest(), hashlib.sha256(index.encode()).hexdigest())' "$root" "$index" 2>/dev/null
}

environment_stands() {
  local now saved
  [ -f "$stamp" ] && find_venv_python && now=$(fingerprint) && saved=$(cat "$stamp") || return 1
  # Index variables that are not set do not count: a user who set them for the first install need
  # not set them in every shell.
  if [ "$index" = '|||' ]; then
    [ "${now% *}" = "${saved% *}" ]
  else
    [ "$now" = "$saved" ]
  fi
}

# --- one install at a time -----------------------------------------------------------------------

running() {
  # kill -0 alone would take a zombie (containers seldom reap them) for a running process, and
  # another user's process for none.
  if [ -r "/proc/$1/stat" ]; then
    case $(cat "/proc/$1/stat" 2>/dev/null) in '' | *') Z '*) return 1 ;; *) return 0 ;; esac
  fi
  kill -0 "$1" 2>/dev/null
}

lock_is_stale() { # True when everything that the lock's file names has ended on this machine.
  local host='' pid
  {
    read -r host || return 1
    while read -r pid; do
      if running "$pid"; then return 1; fi
    done
  } 2>/dev/null <"$lock/holder" || return 1
  [ "$host" = "$(uname -n)" ]
}

take_lock() {
  local told='' nameless=0
  until mkdir "$lock" 2>/dev/null; do
    [ -d "$lock" ] || [ -w "$venv" ] || die "cannot write to $venv." \
      "Make it writable, or set FINETUNE_VENV to a folder that is."
    # The lock has no holder between a process's mkdir and its first line; for longer only if it died there.
    if [ -f "$lock/holder" ]; then nameless=0; else nameless=$((nameless + 1)); fi
    # Only one of several waiting processes may remove a stale lock, or one could remove another's new lock.
    if { lock_is_stale || [ "$nameless" -gt 50 ]; } && mkdir "$lock.steal" 2>/dev/null; then
      if lock_is_stale || [ ! -f "$lock/holder" ]; then rm -rf "$lock"; fi
      rmdir "$lock.steal"
      continue
    fi
    if [ -z "$told" ]; then
      say "another launch.sh is installing into $venv; waiting for it."
      say "(If none is running, delete $lock and start again.)"
      told=yes
    fi
    sleep 0.2
  done
  locked=yes
  printf '%s\n' "$(uname -n)" "$$" >"$lock/holder"
}

drop_lock() {
  [ -z "$locked" ] || rm -rf "$lock"
  locked=
}

stop() { # On a signal: end the running step, so that no install goes on unnoticed.
  trap '' INT TERM HUP
  if [ -n "$child" ]; then
    kill -INT -- "-$child" 2>/dev/null || kill -INT "$child" 2>/dev/null || true
    # Where this script itself runs in the background of another, its children ignore INT.
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      kill -0 "$child" 2>/dev/null || break
      sleep 0.2
    done
    kill -TERM -- "-$child" 2>/dev/null || kill -TERM "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  say "interrupted; the next call finishes the install."
  exit "$1"
}

# --- the install ---------------------------------------------------------------------------------

probe='import sys
state = "ok"
try:
    import ensurepip, venv
except ImportError:
    state = "no-venv"
if sys.version_info < (3, 11):
    state = "old"
print("%s %d.%d.%d" % ((state,) + tuple(sys.version_info[:3])))'

ask() { # Prints state and version of a Python. A name on PATH may be a placeholder that does not run.
  "$1" -E -S -c "$probe" 2>/dev/null </dev/null || echo 'dead'
}

find_python() { # Sets python to the first suitable one.
  local candidate answer seen='' without=''
  set -- python3.13 python3.12 python3.11 python3 python
  [ -z "${PYTHON-}" ] || set -- "$PYTHON"
  for candidate in "$@"; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    answer=$(ask "$candidate")
    case $answer in
      ok*) python=$candidate && return 0 ;;
      no-venv*) without=$candidate && seen="$seen $candidate (${answer#* }, has no venv);" ;;
      old*) seen="$seen $candidate (${answer#* });" ;;
      *) seen="$seen $candidate (does not run);" ;;
    esac
  done
  seen=${seen:- none;}
  [ -z "$without" ] || die "$without cannot make virtual environments: it lacks venv or ensurepip." \
    "Debian, Ubuntu: apt install python3-venv (or python3.X-venv for another version)." \
    "Found:${seen%;}."
  die "no Python 3.11 or later${PYTHON:+ at PYTHON=$PYTHON}. Found:${seen%;}." \
    "Get one from your system (apt install python3.11 python3.11-venv; brew install python@3.12)" \
    "or from python.org, or name one that is not on PATH: PYTHON=/path/to/python ./launch.sh ..."
}

check_arguments() { # Reports a wrong word or path now, not after a long install.
  local said code=0
  said=$(PYTHONPATH=$root "$python" -P -m finetune.launch --check "$@" 2>&1) || code=$?
  [ "$code" -ne 2 ] || { printf '%s\n' "$said" >&2 && exit 2; }
}

check_disk() {
  local need=${FINETUNE_MIN_FREE_GB-} used free
  # CUDA builds of torch, the default on Linux, are the larger part.
  [ -n "$need" ] || case $(uname -s) in Linux) need=7 ;; *) need=3 ;; esac
  case $need in *[!0-9]*) die "FINETUNE_MIN_FREE_GB=$need is not a whole number of gigabytes." ;; esac
  used=$(du -sk "$venv" 2>/dev/null | awk '{print $1}') || true
  free=$(df -Pk "$venv" | awk 'NR == 2 {for (i = 2; i <= NF; i++) if ($i ~ /%$/) {print $(i - 1); exit}}') || true
  if [ -z "$free" ] || [ "$((free + ${used:-0}))" -ge "$((need * 1048576))" ]; then return 0; fi
  die "the install needs $need GB, but the disk of $venv has $((free / 1048576)) GB free." \
    "Free some space, or set FINETUNE_VENV to a folder on another disk. A build of torch for the CPU" \
    "only needs about 2 GB: choose it with pip's PIP_INDEX_URL or PIP_EXTRA_INDEX_URL, and set" \
    "FINETUNE_MIN_FREE_GB=3. FINETUNE_MIN_FREE_GB=0 skips this check."
}

start() {
  cd "$root"
  if [ "$1" = shown ]; then exec "${@:2}" >&2; else exec "${@:2}" >>"$log" 2>&1; fi
}

step() { # step TEXT shown|logged COMMAND...: runs the command and prints its time.
  local text=$1 began=$SECONDS told=$SECONDS code=0
  say "$text ..."
  # Job control gives the command a process group and the usual handling of SIGINT, so that stop()
  # reaches all of it. It runs in the background because bash acts on a signal only between commands.
  set -m
  start "${@:2}" </dev/null &
  child=$!
  set +m
  # If this script is killed, the lock stays as long as the install goes on.
  echo "$child" >>"$lock/holder"
  while kill -0 "$child" 2>/dev/null; do
    if [ "$2" = logged ] && [ $((SECONDS - told)) -ge 30 ]; then
      told=$SECONDS
      say "  still running after $((SECONDS - began)) s ($(du -sh "$venv" 2>/dev/null | cut -f1) so far)"
    fi
    sleep 0.2
  done
  wait "$child" || code=$?
  child=
  [ "$code" -ne 0 ] || say "  done in $((SECONDS - began)) s"
  return "$code"
}

logged() { grep -qiE "$1" "$log"; }

explain_failure() {
  if [ ! -t 2 ]; then # A terminal has shown them.
    printf '%s\n' "--- the last lines of $log" >&2
    tail -n 15 "$log" >&2
    printf '%s\n' "---" >&2
  fi
  if logged 'no space left on device|disk quota exceeded'; then
    die "the disk is full." "Free some space; pip also writes to TMPDIR (now ${TMPDIR:-/tmp}) and to its cache" \
      "(pip cache purge empties it). Then start again: finished downloads are kept."
  elif logged 'connection (broken|refused|reset|aborted)|connectionerror|timed out|name resolution|proxyerror|sslerror|certificate_verify|[45][0-9][0-9] (client|server) error'; then
    die "pip could not reach the package index." \
      "Check the network; behind a firewall set HTTPS_PROXY, or PIP_INDEX_URL to an index that you can" \
      "reach (PIP_CERT for its certificate). With no network at all, FINETUNE_SKIP_INSTALL=1 uses an" \
      "existing environment unchanged."
  elif logged 'no matching distribution found|could not find a version'; then
    die "the package index has no build of that package for this Python and system." \
      "Try Python 3.11, 3.12 or 3.13 (PYTHON=python3.12), or an index that has it (PIP_INDEX_URL)."
  elif logged 'permission denied|read-only file system'; then
    die "cannot write to $venv." "Make it writable, or set FINETUNE_VENV to a folder that is."
  fi
  die "the install failed; the lines above show where." "The full log is $log. Delete $venv to install from scratch."
}

check_folder() { # Refuses a folder that holds something else.
  local file
  mkdir -p "$venv" 2>/dev/null || die "cannot make the folder $venv." \
    "Make its parent folder writable, or set FINETUNE_VENV to a folder that can be made."
  [ ! -f "$venv/pyvenv.cfg" ] && [ ! -f "$unfinished" ] || return 0
  for file in "$venv"/*; do
    case $file in "$log" | "$venv/*") ;; *) die "$venv must be empty or a Python environment, but it holds other files." \
      "Set FINETUNE_VENV to a new or an empty folder." ;; esac
  done
}

empty_venv() {
  find "$venv" -mindepth 1 -maxdepth 1 ! -name '.launch-lock*' ! -name install.log -exec rm -rf {} +
}

make_venv() {
  local answer=dead
  if [ -f "$venv/pyvenv.cfg" ] && [ ! -f "$unfinished" ]; then
    if find_venv_python; then answer=$(ask "$venv_python"); fi
    case $answer in
      old*) die "the environment in $venv must have Python 3.11 or later, but it has ${answer#* }." \
        "Delete it, or set FINETUNE_VENV to another folder." ;;
      ok* | no-venv*)
        "$venv_python" -m pip --version >/dev/null 2>&1 ||
          step 'adding pip' logged "$venv_python" -m ensurepip || explain_failure
        return 0 ;;
    esac
    say "the environment in $venv no longer runs; making it again."
    empty_venv
  elif [ -f "$unfinished" ]; then
    empty_venv
  fi
  : >"$unfinished"
  step "making an environment in $venv with $("$python" --version 2>&1)" logged "$python" -m venv "$venv" ||
    explain_failure
  find_venv_python || die "$python made no Python in $venv." "Set PYTHON to another one."
  rm -f "$unfinished"
}

drop_torn_packages() {
  # pip writes a package's RECORD last. Without it the install was incomplete, but pip would treat the
  # package as installed.
  local folder
  for folder in "$venv"/lib/python*/site-packages/*.dist-info "$venv"/Lib/site-packages/*.dist-info; do
    [ ! -d "$folder" ] || [ -f "$folder/RECORD" ] || rm -rf "$folder"
  done
}

install() {
  local how='logged' option='--progress-bar=off'
  if [ -t 2 ]; then how='shown' option="--log=$log"; fi
  check_disk
  { : >"$log"; } 2>/dev/null || die "cannot write to $venv." \
    "Make it writable, or set FINETUNE_VENV to a folder that is."
  rm -f "$stamp"
  make_venv
  drop_torn_packages
  step "installing the pinned packages (the first time: some minutes; log: $log)" "$how" \
    "$venv_python" -m pip install --no-input --disable-pip-version-check "$option" \
    -c constraints.txt -e '.[dev]' || explain_failure
  # A rename: the stamp is complete or missing.
  fingerprint >"$stamp.new" && mv -f "$stamp.new" "$stamp"
}

ensure_environment() {
  if [ -n "${FINETUNE_SKIP_INSTALL-}" ] && [ "$FINETUNE_SKIP_INSTALL" != 0 ]; then
    find_venv_python || die "FINETUNE_SKIP_INSTALL is set, but there is no environment in $venv." \
      "Unset it to have one built, or set FINETUNE_VENV to one that exists."
    return 0
  fi
  if environment_stands; then return 0; fi
  find_python
  check_arguments "$@"
  check_folder
  trap drop_lock EXIT
  trap 'stop 130' INT
  trap 'stop 143' TERM
  trap 'stop 129' HUP
  take_lock
  environment_stands || install
  drop_lock
  trap - EXIT INT TERM HUP
}

case ${1-} in
  -h | --help | help) usage && exit 0 ;;
  '') usage >&2 && exit 2 ;;
esac
ensure_environment "$@"
# -P: a file in the current folder must not shadow a package.
exec "$venv_python" -P -m finetune.launch "$@"

# shellcheck shell=bash
# For the other scripts, to be sourced: goes to the checkout and offers a Python environment in its .venv, with moetrain
# in it. PYTHON=python3.12 chooses the interpreter. An environment that is there is reused, and brought up to date only
# after pyproject.toml has changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

fail() {
  echo "$*" >&2
  exit 2
}

find_python() {
  local python
  for python in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
    if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "moetrain needs Python 3.10, 3.11 or 3.12, and found none of them (PYTHON=${PYTHON:-not set})." \
    "Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

num_gpus() {
  { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
}

# install . or install '.[test]': moetrain from this checkout, editable, into .venv, which is then active.
install() {
  local python want stamp=".venv/installed${1#.}"
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python) || exit 2
    "$python" -m venv .venv || fail "$python -m venv failed (on Debian and Ubuntu: apt-get install python3-venv)."
  fi
  export PATH="$PWD/.venv/bin:$PATH"
  want=$(cksum <pyproject.toml)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    echo "Installing moetrain into $PWD/.venv; the first time this takes some minutes ..." >&2
    if [ "$(uname -s)" = Linux ] && [ "$(num_gpus)" = 0 ]; then
      # The build of torch without CUDA is gigabytes smaller. Its index is asked beside PyPI, where its version counts as
      # the newer one; if it can not be reached, pip takes what PyPI has.
      python -m pip install --quiet --quiet --retries 1 --timeout 15 \
        --extra-index-url https://download.pytorch.org/whl/cpu "torch>=2.11,<2.14"
    fi
    python -m pip install --quiet --editable "$1"
    echo "$want" >"$stamp"
  fi
}

# threads N: give each of N processes on this machine its share of the cores, and have malloc keep the memory of large
# tensors (fresh pages are the largest hidden cost of a step on a CPU), unless the user has decided.
threads() {
  local cores
  export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647}"
  cores=$(getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}"
}

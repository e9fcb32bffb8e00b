#!/usr/bin/env bash
# Makes the virtual environment and installs slmjax into it, editable, with the given extras at the locked versions:
#
#   launch/install.sh data,dev
#
#   PYTHON   the interpreter (default: the first of python3, python3.13, python3.12, python3.11 that is new enough)
#   VENV     the environment (default .venv)
set -euo pipefail

extras=${1:?usage: launch/install.sh EXTRA[,EXTRA...]}
venv=${VENV:-.venv}
cd "$(dirname "$0")/.."

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  candidate=${PYTHON:-python3}
  echo "slmjax needs Python 3.11 or newer; $candidate is $("$candidate" --version 2>/dev/null || echo "not there")." >&2
  echo "Install one and name it: make PYTHON=/path/to/python3.12 ..." >&2
  return 1
}

if ! new_enough "$venv/bin/python"; then
  python=$(find_python)
  echo "Creating $venv with $("$python" --version)"
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "$python cannot make virtual environments: its modules venv and ensurepip are missing." >&2
    echo "On Debian and Ubuntu: sudo apt install python3-venv" >&2
    exit 1
  fi
  "$python" -m venv --clear "$venv"
fi

echo "Installing slmjax[$extras] into $venv (the first time this downloads about 300 MB)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input -e ".[$extras]" -c constraints.txt

# Compilers for accelerators that are not there, for the tests: beside the environment and not in it, where JAX would try
# to start their plugins in every run. The list is that of the extra `compile`.
if [[ ",$extras," == *,dev,* && "$(uname -s) $(uname -m)" == "Linux x86_64" ]]; then
  echo "Installing compilers for Hopper and TPU into $venv/compilers (about 600 MB more)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --upgrade \
    --target "$venv/compilers" -c constraints.txt libtpu jax-cuda12-plugin jax-cuda12-pjrt \
    nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-cupti-cu12 nvidia-nvjitlink-cu12
fi

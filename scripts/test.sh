#!/usr/bin/env bash
# Installs memfold with its `dev` extra into .venv if needed and runs the tests, one process per core.
# Arguments go to pytest: bash scripts/test.sh tests/strategies -k roast
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

prepare_environment dev
# The tests share the cores already: without this, every process starts one thread per core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Where bytecode may not be written, every process that a test starts compiles torch again: eight seconds.
unset PYTHONDONTWRITEBYTECODE
exec "$venv_python" -m pytest -n logical --maxprocesses 8 "$@"

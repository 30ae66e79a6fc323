#!/usr/bin/env bash
# Every method on Fashion-MNIST, at ratios from 0.3 to 0.003 with three seeds, then the report.
# Started again after an interruption, it goes on. The first argument is the folder for it all.
#     bash scripts/compare_fashion_mnist.sh
set -euo pipefail
[[ -z ${1:-} || $1 == /* ]] || set -- "$PWD/$1" # setup.sh leaves this folder
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

out=${1:-outputs/fashion_mnist}
prepare_environment base
export OMP_NUM_THREADS=1 # as many runs as cores, each with one thread
"$venv_python" scripts/compare.py comparisons/fashion_mnist.yaml --out "$out"
exec "$venv_python" scripts/report.py "$out/runs" --out "$out/report" \
    --title "LeNet-300-100 on Fashion-MNIST"

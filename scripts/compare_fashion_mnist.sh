#!/usr/bin/env bash
# LeNet-300-100 in files of 60,000 to 5,000 bytes by every method, and other small networks, on Fashion-MNIST,
# with five seeds, then the report. Started again after an interruption, it goes on.
# The first argument is the folder for it all; further ones are pieces to run: 60kB, 12kB, 5kB (all of
# them by default), ratios (fifteen methods at equal ratios with three seeds, as results/fashion_mnist).
#     bash scripts/compare_fashion_mnist.sh
set -euo pipefail
[[ -z ${1:-} || $1 == /* ]] || set -- "$PWD/$1" "${@:2}" # setup.sh leaves this folder
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

out=${1:-outputs/fashion_mnist}
pieces=("${@:2}")
((${#pieces[@]})) || pieces=(60kB 12kB 5kB)
prepare_environment base
export OMP_NUM_THREADS=1 # as many runs as cores, each with one thread
for piece in "${pieces[@]}"; do
    "$venv_python" scripts/compare.py "comparisons/fashion_mnist/$piece.yaml" --out "$out/$piece"
done
exec "$venv_python" scripts/report.py "$out"/*/runs --out "$out/report" --join-backbones \
    --title "LeNet-300-100 and other networks on Fashion-MNIST"

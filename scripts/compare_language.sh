#!/usr/bin/env bash
# Sixteen methods on Tiny Shakespeare, an 8-layer GPT in files of 920,000 to 35,000 bytes and a wider one of
# 4 layers in 1,840,000, with three seeds, then the report. Started again after an interruption, it goes on.
# The first argument is the folder for it all; further ones are pieces to run: half, sixth, fifteenth,
# fiftieth, wide (all of them by default).
#     bash scripts/compare_language.sh
set -euo pipefail
[[ -z ${1:-} || $1 == /* ]] || set -- "$PWD/$1" "${@:2}" # setup.sh leaves this folder
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

out=${1:-outputs/shakespeare}
pieces=("${@:2}")
((${#pieces[@]})) || pieces=(half sixth fifteenth fiftieth wide)
prepare_environment base
export OMP_NUM_THREADS=1 # as many runs as cores, each with one thread
for piece in "${pieces[@]}"; do
    "$venv_python" scripts/compare.py "comparisons/shakespeare/$piece.yaml" --out "$out/$piece"
done
exec "$venv_python" scripts/report.py "$out"/*/runs --out "$out/report" --title "GPT on Tiny Shakespeare"

#!/usr/bin/env bash
# Installs memfold into .venv if needed and trains ResNet-20 on the embedded digits at ratio 0.01.
# Arguments go to train.py: bash scripts/quickstart.sh seed=1 trainer.max_epochs=2
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

prepare_environment base
exec "$venv_python" train.py \
    backbone=resnet20 data=digits compression=stable_rps ratio=0.01 "$@"

#!/usr/bin/env bash
# Trains one model on several nodes of a SLURM cluster, with one process per GPU. Submit it in the
# repository's root; options of sbatch come before its name, overrides of train.py after it:
#   sbatch --nodes=2 --gpus-per-node=4 scripts/train_slurm.sh compression=stable_rps ratio=0.01
# The run folder is outputs/slurm-JOBID. When its time is over or it is preempted, the job saves a
# checkpoint, goes back to the queue and continues from there; scancel ends it.
#SBATCH --job-name=memfold
#SBATCH --cpus-per-gpu=4
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# SLURM runs a copy of this file from a folder of its own.
[[ -n ${SLURM_SUBMIT_DIR:-} ]] || fail "submit this file with sbatch"
cd "$SLURM_SUBMIT_DIR"
[[ -f train.py ]] || fail "submit this file in the folder that has train.py"
python=python
[[ -x .venv/bin/python ]] && python=.venv/bin/python

# GPUs may be given with their type, as in a100:4.
gpus=${SLURM_GPUS_PER_NODE:-}
tasks=${SLURM_NTASKS_PER_NODE:-${gpus##*:}}
[[ -n $tasks ]] || fail "say how many GPUs a node shall have: sbatch --gpus-per-node=N"

folder=outputs/slurm-$SLURM_JOB_ID
trainer=(trainer=ddp)
for argument in "$@"; do
    case $argument in
        hydra.run.dir=*) folder=${argument#*=} ;;
        trainer=*) trainer=() ;;
    esac
done
place=("hydra.run.dir=$folder")
if [[ -e $folder/checkpoints/last.ckpt || -e $folder/rounds/0 ]]; then
    place=("resume=$folder")
fi

trap : TERM # srun gets the signal too, and ends when a checkpoint has been saved
status=0
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * tasks))" \
    --ntasks-per-node="$tasks" --kill-on-bad-exit=1 \
    "$python" train.py "${trainer[@]}" "$@" "${place[@]}" || status=$?

# 143 is SIGTERM. A job that was cancelled has another state than RUNNING by now.
if [[ $status == 143 && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/bin/bash
# Stage 1 on Slurm without a Ray cluster: each task of a job array encodes its part of the clips with a Ray of its own.
# sbatch --array=1-64 [OPTIONS] slurm_array.sh --manifest ... --output ...
# Tasks may run at any time, in any number at once, and be requeued: parts are decided by the clips' names.
#SBATCH --job-name=latentmill
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
set -eu

# Tasks on one node must not join each other's Ray.
unset RAY_ADDRESS
export RAY_TMPDIR=/tmp/ray-$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID
mkdir -p "$RAY_TMPDIR"

# exec: Slurm's warning reaches the driver, which finishes the shards that run, or leaves them cleanly
exec python -m preprocess --address local --partition "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@"

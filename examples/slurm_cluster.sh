#!/bin/bash
# Stage 1 on Slurm with a Ray cluster inside the allocation: sbatch [OPTIONS] slurm_cluster.sh --manifest ... --output ...
# One task a node; the first is the head. Submitted again, or requeued, it goes on where it was.
#SBATCH --job-name=latentmill
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
set -eu

RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
# Jobs on one node must not share Ray's folder. A short path: sockets lie below it.
folder=/tmp/ray-$SLURM_JOB_ID

srun --overlap --nodes=1 --ntasks=1 -w "$node" \
    ray start --head --port="$port" --temp-dir="$folder" --include-dashboard=false --disable-usage-stats --block &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --overlap --nodes="$others" --ntasks="$others" -x "$node" \
        ray start --address="$node:$port" --temp-dir="$folder" --disable-usage-stats --block &
fi
# The driver waits for workers, so it need not wait for the other nodes; only the head must answer.
until ray health-check --address "$node:$port" > /dev/null 2>&1; do sleep 2; done

python -m preprocess --address "$node:$port" "$@" &
driver=$!
trap 'kill -TERM $driver' TERM # Slurm's warning: shards that run are finished, or left cleanly
code=0
wait "$driver" || code=$?
if kill -0 "$driver" 2> /dev/null; then # the trap ended the first wait
    code=0
    wait "$driver" || code=$?
fi
exit "$code"

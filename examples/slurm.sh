#!/bin/bash
#SBATCH --job-name=refinelens
#SBATCH --array=1-8
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
# One shard of a sweep in each job of an array:
#
#     sbatch examples/slurm.sh runs/nq --model ./my-model --task nq --documents 10,20
#     refinelens merge runs/nq.* --out runs/nq        # once all are done
#
# A shard that was begun goes on where it was: the same command runs again what was killed, or ran out of time. Two
# minutes before that a sweep is told to end, and writes the question under way. To run some shards alone, say of how
# many: SHARDS=8 sbatch --array=3,5 examples/slurm.sh ...
set -euo pipefail
out="$1.$SLURM_ARRAY_TASK_ID"
shift
if [ -e "$out/manifest.json" ]; then
    exec refinelens sweep --resume "$out" --no-report
fi
exec refinelens sweep "$@" --shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}" --out "$out" --no-report

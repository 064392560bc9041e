#!/usr/bin/env bash
# A search on a Slurm cluster: the first task of the array is the run, the others are its workers.
#   export DEPLOYPIPE_STORAGE=postgresql://USER:PASSWORD@HOST/NAME
#   sbatch examples/fleet/slurm.sh digits x86_cpu
# A task that is ended and put back in the queue goes on: the run where it stopped, a worker with the next free trial.
#SBATCH --job-name=deploypipe
#SBATCH --array=0-7
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --exclusive=user
#SBATCH --output=deploypipe-%A_%a.log
set -euo pipefail

pipeline=${1:?a pipeline}
target=${2:?a target}
: "${DEPLOYPIPE_STORAGE:?the address of the database that the tasks share}"
run="$pipeline-$target-$SLURM_ARRAY_JOB_ID"

if [ "$SLURM_ARRAY_TASK_ID" -eq 0 ]; then
    # The run folder has to lie where all nodes see it; otherwise add --stages s3://BUCKET/$run
    deploypipe run "$pipeline" "$target" --out "runs/$run" --set "search.num_parallel=$((2 * SLURM_ARRAY_TASK_COUNT))"
else
    deploypipe worker --run "$run" --wait 3600
fi

#!/usr/bin/env bash
#SBATCH --job-name=dalle2_jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
# Trains on the nodes of a Slurm job, one process a node; the environment must be there on all of them (launch/env.sh).
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/pods/slurm.sh \
#       -- --config=configs/decoder64.py --workdir=/shared/DIR --config.data.path=/shared/shards
#
#   --python=python   the interpreter of the environment, the same on every node
#   --retries=3       how often to queue again after a process was lost (status 4) or killed (137): such losses are
#                     counted in .slurm-JOB.lost in the repository until the job ends; time limits do not count
#
# Five minutes before the time limit, and when the job is preempted, training saves; then the job is queued again and goes
# on. It is not queued again when training has finished, nor for wrong settings (status 2) or numbers (status 3).
set -euo pipefail
here="${DALLE2_JAX_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}" # sbatch runs a copy of this file from elsewhere
[ -f "$here/launch/pods/common.sh" ] || { echo "error: submit this from the repository" >&2 && exit 2; }
source "$here/launch/pods/common.sh"
parse python=python retries=3 -- "$@"
check_training
[ -n "$DRY" ] || [ -n "${SLURM_JOB_ID:-}" ] || fail "this runs in a job: sbatch --nodes=N $0 -- ..."
cd "$here"
# A process that fails ends the others of the step; jax.distributed finds its address in the variables of srun.
command=(srun --kill-on-bad-exit=1 --label "$python" -m dalle2_jax.train "${TRAIN[@]}")
if [ -n "$DRY" ]; then
  run "${command[@]}"
  exit
fi
lost="$here/.slurm-$SLURM_JOB_ID.lost" # on the nodes' shared disk; Slurm's own count has every time limit in it
[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || rm -f "$lost" # of an earlier job with this number
step=0 preempted="" again=""
trap 'preempted=yes; [ "$step" = 0 ] || kill -TERM "$step" 2> /dev/null || true' TERM
"${command[@]}" &
step=$! status=0
[ -z "$preempted" ] || kill -TERM "$step" 2> /dev/null || true
wait "$step" || status=$?
while kill -0 "$step" 2> /dev/null; do wait "$step" && status=0 || status=$?; done
if [ -n "$preempted" ] && [ "$status" = 0 ]; then
  again="stopped before the end and saved"
elif [ "$status" = 4 ] || [ "$status" = 137 ]; then
  echo "status $status" >> "$lost" && [ "$(wc -l < "$lost")" -le "$retries" ] && again="a process was lost (status $status)"
fi
if [ -n "$again" ]; then
  echo "$again; queued again"
  scontrol requeue "$SLURM_JOB_ID"
else
  rm -f "$lost" || true
fi
exit "$status"

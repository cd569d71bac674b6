#!/usr/bin/env bash
# Trains on this machine: installs the package, and restarts after a failure that may be temporary.
#
#   EXTRAS=cuda bash launch/pods/host.sh --retries=3 -- --config=configs/decoder64.py --workdir=DIR --config.data.path=...
#
#   --retries=0   restarts after failures, except wrong settings (status 2) and numbers that are not finite (status 3)
#
# EXTRAS is cuda, tpu or empty. After SIGTERM or Ctrl-C training saves and ends without a restart. A failed installation
# has status 5.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse retries=0 -- "$@"
check_training
if [ -n "$DRY" ]; then
  run python -m dalle2_jax.train "${TRAIN[@]}"
  exit
fi
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
cd "$ROOT"
FAIL_STATUS=5 prepare train
child=0 stopped=""
trap 'stopped=yes; [ "$child" = 0 ] || kill -TERM "$child" 2> /dev/null || true' TERM INT
for ((try = 0; ; try++)); do
  python -m dalle2_jax.train "${TRAIN[@]}" &
  child=$! status=0
  [ -z "$stopped" ] || kill -TERM "$child" 2> /dev/null || true
  wait "$child" || status=$?
  while kill -0 "$child" 2> /dev/null; do wait "$child" && status=0 || status=$?; done # a signal ends `wait` early
  [ "$status" != 0 ] && [ "$status" != 2 ] && [ "$status" != 3 ] && [ -z "$stopped" ] && [ "$try" -lt "$retries" ] ||
    exit "$status"
  echo "training ended with status $status; again from the last checkpoint" >&2
done

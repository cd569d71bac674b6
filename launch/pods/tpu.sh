#!/usr/bin/env bash
# Trains on a Cloud TPU slice that is asked for as a queued resource.
#
#   bash launch/pods/tpu.sh --name=dalle2 --project=P --zone=Z --type=v5p-128 \
#       -- --config=configs/decoder64.py --workdir=gs://BUCKET/DIR --config.data.path=/mnt/shards
#
#   --name      of the queued resource and its node          --project, --zone   where
#   --type      accelerator type, such as v5p-128            --runtime=v2-alpha-tpuv5   version of the hosts' software
#   --spot=no   yes: cheaper, and taken away at any time      --keep=no   yes: leave the slice when training has ended
#   --setup=    a command for every host first, such as one that mounts the shards at /mnt/shards
#
# Copies this repository to every host, installs it there and starts the same command on all of them. A slice that is
# taken away is asked for again, and training goes on from its last checkpoint. Ended by status 0, by wrong settings
# (status 2) or numbers (status 3).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse name=? project=? zone=? type=? runtime=v2-alpha-tpuv5 spot=no keep=no setup= -- "$@"
check_training
need gcloud
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
place=(--project="$project" --zone="$zone")
tpu=(gcloud compute tpus)

state() { "${tpu[@]}" queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2> /dev/null || true; }

ask() {
  local kind=()
  [ "$spot" = no ] || kind=(--spot)
  run "${tpu[@]}" queued-resources create "$name" --node-id="$name" "${place[@]}" --accelerator-type="$type" \
    --runtime-version="$runtime" "${kind[@]}"
}

forget() { run "${tpu[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet; }

await() {
  [ -z "$DRY" ] || return 0
  local now last=""
  while now="$(state)" && [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING) return 1 ;;
    esac
    [ "$now" = "$last" ] || echo "$name: ${now:-not known yet}"
    last=$now
    sleep 30
  done
}

everywhere() { run "${tpu[@]}" tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"; }

install() {
  local archive
  archive="$(mktemp -d)/dalle2_jax.tar.gz"
  run git -C "$ROOT" archive --format=tar.gz --output="$archive" HEAD
  run "${tpu[@]}" tpu-vm scp "$archive" "$name:dalle2_jax.tar.gz" "${place[@]}" --worker=all
  everywhere "mkdir -p dalle2_jax && tar -xzf dalle2_jax.tar.gz -C dalle2_jax${setup:+ && $setup}"
}

train() { everywhere "cd dalle2_jax && EXTRAS=tpu bash launch/pods/host.sh -- $(quoted "${TRAIN[@]}")"; }

while :; do
  [ -n "$DRY" ] || [ -n "$(state)" ] || ask
  [ -z "$DRY" ] || ask
  status=0
  if await; then
    install && train || status=$?
    if [ -n "$DRY" ] || [ "$status" = 0 ] || [ "$status" = 2 ] || [ "$status" = 3 ]; then
      [ "$keep" != no ] || forget
      exit "$status"
    fi
    [ "$(state)" != ACTIVE ] || { echo "status $status; the slice is there: again" >&2 && sleep 30 && continue; }
  fi
  echo "the slice was taken away: asking for another" >&2
  forget || true
done

#!/usr/bin/env bash
# Trains on a Cloud TPU slice, requested as a queued resource.
#
#   bash launch/pods/tpu.sh --name=dalle2 --project=P --zone=Z --type=v5p-128 \
#       -- --config=configs/decoder64.py --workdir=gs://BUCKET/DIR --config.data.path=/mnt/shards
#
#   --name      of the queued resource and its node          --project, --zone   where
#   --type      accelerator type, such as v5p-128            --runtime=v2-alpha-tpuv5   version of the hosts' software
#   --spot=no   yes: cheaper, may be preempted at any time    --keep=no   yes: do not delete the slice at the end
#   --setup=    a first command for every host, such as one that mounts the shards at /mnt/shards
#   --retries=5   restarts on a slice that still exists
#
# Copies this repository to every host, installs it and starts the same command on all of them. A preempted slice is
# requested again until it comes, also after failed requests, and training resumes from its last checkpoint; job.sh
# distinguishes a stopped training from a finished one. The script ends after a failed first request, with status 0, wrong
# settings (status 2), numbers that are not finite (status 3), a failed installation (status 5), or another failure after
# --retries restarts on one slice.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse name=? project=? zone=? type=? runtime=v2-alpha-tpuv5 spot=no keep=no setup= retries=5 -- "$@"
check_training
[[ $retries =~ ^[0-9]+$ ]] || fail "--retries=$retries must be a whole number"
need gcloud
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
place=(--project="$project" --zone="$zone")
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
tpu=(gcloud compute tpus)

# Prints the state of the slice, nothing if it does not exist, UNKNOWN if gcloud fails.
state() {
  local try output errors="$scratch/errors"
  for try in 1 2 3 4 5; do
    if output="$("${tpu[@]}" queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2> "$errors")"; then
      echo "$output"
      return
    fi
    grep -qi 'not[_ ]found' "$errors" && return
    [ "$try" = 5 ] || sleep 10
  done
  cat "$errors" >&2
  echo UNKNOWN
}

ask() {
  local kind=()
  [ "$spot" = no ] || kind=(--spot)
  run "${tpu[@]}" queued-resources create "$name" --node-id="$name" "${place[@]}" --accelerator-type="$type" \
    --runtime-version="$runtime" "${kind[@]}"
}

forget() { run "${tpu[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet; }

await() {
  [ -z "$DRY" ] || return 0
  local now last="" unseen=0
  while now="$(state)" && [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING) return 1 ;;
      "") # deleted, or a new request that gcloud does not list yet
        unseen=$((unseen + 1))
        [ -z "$last" ] && [ "$unseen" -lt 10 ] || return 1
        ;;
    esac
    [ "$now" = "$last" ] || echo "$name: $now"
    last=$now
    sleep 30
  done
}

everywhere() { run "${tpu[@]}" tpu-vm ssh "$name" "${place[@]}" --worker=all --batch-size=all --command="$1"; }

install() {
  local archive="$scratch/dalle2_jax.tar.gz"
  run git -C "$ROOT" archive --format=tar.gz --output="$archive" HEAD &&
    run "${tpu[@]}" tpu-vm scp "$archive" "$name:dalle2_jax.tar.gz" "${place[@]}" --worker=all &&
    everywhere "mkdir -p dalle2_jax && tar -xzf dalle2_jax.tar.gz -C dalle2_jax${setup:+ && $setup}"
}

train() { everywhere "cd dalle2_jax && EXTRAS=tpu bash launch/pods/job.sh bash launch/pods/host.sh -- $(quoted "${TRAIN[@]}")"; }

# ended STATUS: what the status says, after giving the slice back.
ended() {
  local try
  if [ "$keep" = no ]; then
    for try in 1 2 3 4 5; do
      forget && exit "$1"
      [ "$try" = 5 ] || sleep 60
      [ -n "$(state)" ] || exit "$1"
    done
    echo "error: the slice could not be given back and may cost money: delete the queued resource $name" >&2
  fi
  exit "$1"
}

failures=0 had="" # had: the slice has existed or was requested, so a failed request may succeed later
while :; do
  now="$([ -n "$DRY" ] || state)"
  [ -n "$had" ] || [ "$now" != UNKNOWN ] || fail "gcloud does not tell whether $name is there; its lines above say why"
  if [ -z "$now" ]; then
    failures=0
    if ! ask; then # the next round looks first: the request may have been heard
      [ -n "$had" ] || [ -n "$(state)" ] || fail "the slice could not be asked for; gcloud's lines above say why"
      echo "asking failed; again in 60 seconds" >&2
      sleep 60
      continue
    fi
  fi
  had=yes
  if await; then
    status=1
    if install; then train && status=0 || status=$?; fi
    case $status in 0 | 2 | 3 | 5) ended "$status" ;; esac
    case $(state) in
      ACTIVE | UNKNOWN)
        failures=$((failures + 1))
        if [ "$failures" -gt "$retries" ]; then
          echo "status $status, and the slice is there: given up after $retries retries" >&2
          ended "$status"
        fi
        echo "status $status; the slice is there: again" >&2
        sleep 30
        continue
        ;;
    esac
  fi
  echo "the slice was taken away: asking for another" >&2
  forget || true
  sleep 30
done

#!/usr/bin/env bash
# From a clean machine to pictures: installs, draws with the bundled model, trains the tiny cascade of configs/tiny from
# nothing (CLIP, prior, decoder, two upsamplers), measures it and draws with it.
#
#   bash launch/quickstart.sh
#
# 24 to 37 minutes on two CPU cores after the installation (docs/quickstart.md). After an interruption the same command
# continues. All output is in quickstart/ in the repository, or in QUICKSTART_DIR.
# EXTRAS=cuda or EXTRAS=tpu installs JAX for these; see env.sh for PYTHON and DALLE2_JAX_VENV.
set -euo pipefail
[ -z "${QUICKSTART_DIR:-}" ] || { mkdir -p "$QUICKSTART_DIR" && QUICKSTART_DIR="$(cd "$QUICKSTART_DIR" && pwd)"; }
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"
DIR="${QUICKSTART_DIR:-quickstart}"
AGAIN="${QUICKSTART_DIR:+QUICKSTART_DIR='$DIR' }bash launch/quickstart.sh"

# The captions of the last grid. Training has no picture of the combinations of the last two groups.
SEEN=("a red star" "a blue circle" "a red star above a blue ring" "a green circle to the left of an orange triangle")
NEW_PAIRS=("a yellow star" "a purple cross" "a red ring" "a green square")
NEW_RELATIONS=("a red star above a blue cross" "a blue star to the left of a red circle")
NEW_RELATIONS+=("a purple triangle above a green ring" "an orange ring to the left of a purple square")

huge_pages
steps=9 number=0 child=0 stopped="" key="$(cat configs/common.py configs/tiny/*.py | cksum)"

# Prints a command so that it can be pasted into a shell.
quoted() {
  local word line="" plain='^[A-Za-z0-9_./,:=@%+-]+$'
  for word; do
    if [[ $word =~ $plain ]]; then line="$line $word"; else line="$line '${word//\'/\'\\\'\'}'"; fi
  done
  echo "${line# }"
}

# Tells the running command to save and end; the second time kills it. `step` then ends the script.
stop() {
  local signal=TERM
  [ -z "$stopped" ] || signal=KILL
  [ -n "$stopped" ] || echo "stopping: what runs saves first; a compilation ends first (again to stop at once)" >&2
  stopped=yes
  [ "$child" = 0 ] || kill -"$signal" "$child" 2> /dev/null || true
}

# step NAME COMMAND...: runs the command, unless it is done, and writes its seconds to timings.txt.
# done/NAME has a checksum of the recipes and of all commands up to this one, so a change repeats all later steps.
step() {
  local name="$1" began=$SECONDS status=0 note="" guard=()
  shift
  number=$((number + 1))
  key="$(echo "$key $*" | cksum)"
  if [ "$(cat "$DIR/done/$name" 2> /dev/null)" = "$key" ]; then
    say "[$number/$steps] $name: done before"
    return
  fi
  say "[$number/$steps] $name"
  echo "   $(quoted python "$@")"
  # In a new process group, so that Ctrl-C reaches the command once, through `stop`. Where the system can, the command
  # also gets a signal when this script is killed.
  setpriv --pdeathsig TERM true 2> /dev/null && guard=(setpriv --pdeathsig TERM)
  set -m
  ${guard[@]+"${guard[@]}"} python "$@" < /dev/null &
  child=$!
  set +m
  [ -z "$stopped" ] || kill -TERM "$child" # interrupted between two commands
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2> /dev/null || break # `wait` also returns when a signal arrives
  done
  child=0
  if [ -n "$stopped" ] || [ "$status" = 130 ] || [ "$status" = 143 ] || { [ "$status" = 0 ] && ! trained "$name"; }; then
    note="interrupted"
  elif [ "$status" != 0 ]; then
    note="failed"
  fi
  printf '%-16s %6d s  %s\n' "$name" $((SECONDS - began)) "$note" >> "$DIR/timings.txt"
  case "$note" in
    interrupted)
      printf '\nstopped; go on with\n   %s\n' "$AGAIN" >&2
      exit 130
      ;;
    failed)
      printf '\nerror: this command failed with status %d:\n   %s\n' "$status" "$(quoted "$VENV/bin/python" "$@")" >&2
      printf 'Its last lines say why. What was done before is kept; when that is mended, go on with\n   %s\n' "$AGAIN" >&2
      exit 1
      ;;
  esac
  echo "$key" > "$DIR/done/$name"
}

# Whether a training has its last checkpoint: an interrupted one saves and ends with status 0. True for other commands.
trained() {
  [ ! -e "$DIR/$1/config.json" ] || python - "$DIR/$1" << 'EOF'
import json, pathlib, sys

workdir = pathlib.Path(sys.argv[1])
last = json.loads((workdir / "config.json").read_text()).get("num_steps")
sys.exit(last is not None and not (workdir / "checkpoints" / str(last)).is_dir())
EOF
}

train() {
  local name="$1"
  shift
  step "$name" -m dalle2_jax.train --config="configs/tiny/$name.py" --workdir="$DIR/$name" "$@"
}

prepare train,eval
mkdir -p "$DIR/done"
if command -v flock > /dev/null; then
  exec 9> "$DIR/lock" # held by the running command as well
  flock -w 60 9 || fail "another quickstart is at work in $DIR"
fi
trap stop INT TERM HUP

step bundled -m dalle2_jax.generate "a red star above a blue ring" "a yellow circle" "a purple cross on a white background" \
  "a green triangle to the left of a red square" --n=4 --out="$DIR/bundled"
echo "   drawn by the bundled model: $DIR/bundled/grid.png"
train clip
train prior --config.clip="$DIR/clip"
train decoder --config.clip="$DIR/clip"
train upsampler64
train upsampler256
key="$key $(ls "$DIR"/*/checkpoints 2> /dev/null | cksum)" # a stage that was trained on makes another model
step model -m dalle2_jax.convert workdirs --clip="$DIR/clip" --prior="$DIR/prior" --decoder="$DIR/decoder" \
  --upsamplers="$DIR/upsampler64,$DIR/upsampler256" --out="$DIR/model"
step evaluation -m dalle2_jax.evaluate --model="$DIR/model" --metrics=scenes,retrieval,clip_frechet,clip_mmd \
  --n=128 --out="$DIR/evaluation" --report="$DIR/evaluation/report.html"
step pictures -m dalle2_jax.generate --model="$DIR/model" "${SEEN[@]}" "${NEW_PAIRS[@]}" "${NEW_RELATIONS[@]}" \
  --n=4 --out="$DIR/pictures"

say "pictures"
echo "   $DIR/pictures/grid.png    by the model that was just trained, $DIR/model; training never showed"
printf '        %s\n' "${NEW_PAIRS[@]}" "${NEW_RELATIONS[@]}"
echo "   $DIR/bundled/grid.png     by the bundled model"
say "score (the checker's reading of $DIR/evaluation/*.png; with the pictures in report.html there)"
sed 's/^/   /' "$DIR/evaluation/report.txt"
say "seconds (all of them in $DIR/timings.txt)"
awk '{ if (!($1 in sum)) order[++n] = $1; sum[$1] += $2; all += $2 }
     END { for (i = 1; i <= n; i++) printf "   %-16s %6d\n", order[i], sum[order[i]]; printf "   %-16s %6d\n", "all", all }' \
  "$DIR/timings.txt"
say "to try next"
P="$VENV/bin/python"
echo "   $(quoted "$P" -m dalle2_jax.generate --model="$DIR/model" "a yellow star above a red ring" --n=8 --out="$DIR/mine")"
echo "   $(quoted "$P" -m dalle2_jax.train --config=configs/tiny/decoder.py --workdir="$DIR/decoder" \
  --config.clip="$DIR/clip" --config.num_steps=20000)   # trains on; then run the quickstart again"
echo "   $(quoted "$VENV/bin/tensorboard" --logdir="$DIR")"

#!/usr/bin/env bash
# job.sh COMMAND...: runs a command where a scheduler takes status 0 for "finished": stopped by SIGTERM, which is passed
# on, it ends with 143, though training itself ends with 0 once it has saved.
set -uo pipefail
child=0 stopped=""
trap 'stopped=yes; [ "$child" = 0 ] || kill -TERM "$child" 2> /dev/null' TERM
"$@" &
child=$! status=0
[ -z "$stopped" ] || kill -TERM "$child" 2> /dev/null
wait "$child" || status=$?
while kill -0 "$child" 2> /dev/null; do wait "$child" && status=0 || status=$?; done # a signal ends `wait` early
if [ -n "$stopped" ] && [ "$status" = 0 ]; then status=143; fi
exit "$status"

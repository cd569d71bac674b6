#!/usr/bin/env bash
# Installs what the tests need and runs them: linter, formatter, pytest. Arguments go to pytest.
#
#   bash launch/test.sh                              all but the slow ones
#   bash launch/test.sh --all                        these too (several processes that train)
#   bash launch/test.sh tests/models/diffusion -k ddim -n 0    some of it, in one process
#   EXTRAS=oracle bash launch/test.sh                with the comparisons with torch (installs torch and diffusers)
#
# TEST_WORKERS is the number of processes (default: one a core, at most 8); see env.sh for PYTHON and DALLE2_JAX_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"
prepare train,eval,test

if [ "${1:-}" = --all ]; then
  shift
  set -- -m "" "$@"
fi

lint=0
say "ruff check, ruff format --check"
ruff check . || lint=1
ruff format --check . || lint=1

cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
workers="${TEST_WORKERS:-$((cores < 8 ? cores : 8))}"
say "pytest with $workers processes; its last line holds the tests' wall time"
status=0
python -m pytest --numprocesses "$workers" --dist loadfile --durations 10 "$@" < /dev/null || status=$?
if [ "$lint" != 0 ]; then
  echo "ruff is not content (see above): ruff check --fix . && ruff format ." >&2
  [ "$status" != 0 ] || status=1
fi
exit "$status"

#!/usr/bin/env bash
# Installs the tests' packages and runs linter, formatter, mypy and pytest. Arguments go to pytest.
#
#   bash launch/test.sh                              all but the slow tests
#   bash launch/test.sh --all                        with the slow ones (several processes that train)
#   bash launch/test.sh tests/models/diffusion -k ddim -n 0    some tests in one process, without mypy
#   EXTRAS=oracle bash launch/test.sh                with the comparisons with torch (installs torch and diffusers)
#
# TEST_WORKERS is the number of processes (default: one a core, at most 8); see env.sh for PYTHON and DALLE2_JAX_VENV.
# mypy takes about a minute the first time; its cache is in $DALLE2_JAX_CACHE/mypy (default: ~/.cache/dalle2_jax/mypy).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"
prepare train,eval,test

whole=no
if [ "${1:-}" = --all ]; then
  shift
  [ "$#" != 0 ] || whole=yes
  set -- -m "" "$@"
elif [ "$#" = 0 ]; then
  whole=yes
fi

lint=0 types=0
say "ruff check, ruff format --check"
ruff check . || lint=1
ruff format --check . || lint=1
if [ "$whole" = yes ]; then
  say "mypy (a minute the first time)"
  [ -z "${DALLE2_JAX_CACHE:-}" ] || export MYPY_CACHE_DIR="$DALLE2_JAX_CACHE/mypy"
  mypy || types=1
fi

cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
workers="${TEST_WORKERS:-$((cores < 8 ? cores : 8))}"
say "pytest with $workers processes; its last line holds the tests' wall time"
status=0
python -m pytest --numprocesses "$workers" --dist loadfile --durations 10 "$@" < /dev/null || status=$?
if [ "$lint" != 0 ]; then
  echo "ruff found errors (see above): ruff check --fix . && ruff format ." >&2
fi
if [ "$types" != 0 ]; then
  echo "mypy found errors, or did not run (see above)" >&2
fi
[ "$status" != 0 ] || status=$((lint | types))
exit "$status"

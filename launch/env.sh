# Sourced by the scripts beside it: finds Python, makes an environment and installs the package into it.
#
#   ROOT                the repository; the scripts work in it, wherever they are called from
#   prepare EXTRA,...   makes $VENV hold the package with these extras and puts its programs first in PATH;
#                       does nothing when setup.py, constraints.txt and the extras are as they were
#
#   PYTHON              the interpreter to make the environment with  (default: the first Python 3.11 or 3.12)
#   DALLE2_JAX_VENV     where the environment is                      (default: .venv in the repository)
#   EXTRAS              further extras of setup.py, for instance cuda, tpu or oracle
#   FAIL_STATUS         with which a failure here ends the script       (default: 1)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${DALLE2_JAX_VENV:-$ROOT/.venv}"
trap 'exit 130' INT # else a pip that was interrupted looks like one that failed, and is retried

say() { printf '\n== %s\n' "$*"; }

fail() {
  printf '\nerror: %s\n' "$*" >&2
  exit "${FAIL_STATUS:-1}"
}

# Prints the Python to use. A candidate must run (a shim may have nothing behind it) and be able to make environments.
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null ||
      fail "PYTHON=$PYTHON is no Python 3.11 or newer that can make environments (module venv)"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python python3.12 python3.11; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
      2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "found no Python 3.11 or 3.12 with the module venv: install one (on Debian and Ubuntu: apt-get install" \
    "python3 python3-venv), or name one with PYTHON=/path/to/python"
}

# Runs pip, and once more if it failed: a package index may be out of reach for a moment. Shows the large downloads.
pip_install() {
  local try
  for try in first second; do
    "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" |
      grep --line-buffered -E '(Downloading|Using cached) .* MB|^Building '
    [ "${PIPESTATUS[0]}" = 0 ] && return
    [ "$try" = second ] && return 1
    echo "pip failed; once more in 10 seconds" >&2
    sleep 10
  done
}

prepare() {
  local extras="$1${EXTRAS:+,$EXTRAS}" python state stamp began=$SECONDS
  if ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then # absent, or its making was interrupted
    python="$(find_python)" || exit "${FAIL_STATUS:-1}"
    say "making an environment in $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" || fail "$python -m venv $VENV failed; its lines above say why"
    "$VENV/bin/python" -m pip --version > /dev/null || fail "$VENV has no pip; remove it and run this again"
  fi
  # What is installed is known by the state of the files that decide it, one stamp for each set of extras.
  state="$ROOT $(cat "$ROOT/setup.py" "$ROOT/constraints.txt" | cksum)"
  stamp="$VENV/installed-$(echo "$extras" | tr ',' '-')"
  if [ "$(cat "$stamp" 2> /dev/null)" != "$state" ]; then
    say "installing dalle2_jax[$extras] into $VENV (minutes and some GB the first time)"
    pip_install --editable "$ROOT[$extras]" --constraint "$ROOT/constraints.txt" ||
      fail "the installation failed; its last lines above say why. Run the same command again to retry"
    echo "$state" > "$stamp"
  fi
  PATH="$VENV/bin:$PATH"
  export PATH PYTHONUNBUFFERED=1
  # TensorFlow reads data here and nothing else: it need not tell about its kernels
  export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}" TF_ENABLE_ONEDNN_OPTS="${TF_ENABLE_ONEDNN_OPTS:-0}"
  echo "environment: $VENV, $(python --version), ready after $((SECONDS - began)) s"
}

# Sourced by the scripts in this folder: finds Python, makes an environment and installs the package.
#
#   ROOT                the repository, in which the scripts work
#   prepare EXTRA,...   installs the package with these extras into $VENV and puts its programs first in PATH;
#                       does nothing if setup.py, constraints.txt and the extras have not changed
#
#   PYTHON              the interpreter to make the environment with  (default: the newest Python of 3.11 to 3.13,
#                       which uv downloads if there is none); an existing environment keeps its Python
#   DALLE2_JAX_VENV     the environment                               (default: .venv in the repository)
#   EXTRAS              further extras of setup.py, for instance cuda, tpu or oracle
#   FAIL_STATUS         exit status of a failure here                   (default: 1)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${DALLE2_JAX_VENV:-$ROOT/.venv}"
trap 'exit 130' INT # an interrupted pip is not retried

say() { printf '\n== %s\n' "$*"; }

fail() {
  printf '\nerror: %s\n' "$*" >&2
  exit "${FAIL_STATUS:-1}"
}

# Prints the version of a Python and its state, such as "3.13 fits"; nothing if it does not run (a shim without Python).
# Other states: "old" and "new" versions, "odd" builds without wheels of packages (PyPy, Python without the GIL), and
# "bare", without the modules that make environments (Debian packs them separately).
about() {
  "$1" -c '
import sys
version, state = sys.version_info[:2], "fits"
if version < (3, 11):
    state = "old"
else:
    import sysconfig
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        state = "odd"
    else:
        try:
            import ensurepip, venv
            if version > (3, 13):
                state = "new"
        except ImportError:
            state = "bare"
print("%d.%d %s" % (version + (state,)))' 2> /dev/null < /dev/null
}

# Prints a line "VERSION STATE PATH" for each kind of Python that runs: those in PATH, of pyenv and of uv, in this order.
survey() {
  local path state uv="${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"
  {
    type -aP python3.13 python3.12 python3.11 python3 python python3.14 || true
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[1-3].*/bin/python3 "$uv"/cpython-3.1[1-3].*/bin/python3 \
      2> /dev/null || true
  } | while read -r path; do
    state="$(about "$path")" && echo "$state $path"
  done | awk '!seen[$1, $2]++'
}

# Prints a line "VERSION PATH" for each Python of the survey in $1 that fits, the newest first: from 3.12 on jax is 0.12,
# which multiplies bfloat16 matrices several times as fast on some CPUs.
fitting() {
  sed -n 's/^\([0-9.]*\) fits /\1 /p' <<< "$1" | sort -s -t . -k 2,2nr
}

# Prints the path of uv, installed into the empty folder $1 by the first Python that can.
fetch_uv() {
  local python pythons
  pythons="$(type -aP python3.14 python3.13 python3.12 python3.11 python3 python)" || true
  while read -r python; do
    [ -n "$python" ] || continue
    if "$python" -m venv "$1/venv" > /dev/null 2>&1; then
      "$1/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv >&2 && echo "$1/venv/bin/uv"
      return
    elif "$python" -m pip --version > /dev/null 2>&1; then # Debian may have pip and no ensurepip
      "$python" -m pip install --quiet --disable-pip-version-check --target "$1/uv" uv >&2 && echo "$1/uv/bin/uv"
      return
    fi
  done <<< "$pythons"
  echo "no Python here can install uv: none has the modules venv and ensurepip, or pip" >&2
  return 1
}

# Prints the path of uv's Python 3.13. If uv is not in PATH, it is installed temporarily.
uv_python() (
  scratch="" uv="$(type -P uv)" || true
  trap 'exit 130' INT TERM
  trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT
  if [ -z "$uv" ]; then
    scratch="$(mktemp -d)" && uv="$(fetch_uv "$scratch")" || exit 1
  fi
  export UV_PYTHON_PREFERENCE=only-managed # a shim in PATH without Python would end the search
  # --system: not the Python of an environment
  "$uv" python install 3.13 >&2 && "$uv" python find --system 3.13
)

# Prints why each Python of the survey in $1 is not used.
objections() {
  local version state path why
  while read -r version state path; do
    case "$state" in
      old) why="too old" ;;
      new) why="TensorFlow has no build for it; PYTHON=$path takes it all the same, and data is read without TensorFlow" ;;
      odd) why="PyPy or a build without the GIL, for which packages have no builds" ;;
      bare) why="it cannot make environments; on Debian and Ubuntu: apt-get install python$version-venv" ;;
      *) continue ;;
    esac
    printf '\n  %s is Python %s: %s' "$path" "$version" "$why"
  done <<< "$1"
}

# Checks $PYTHON.
check_python() {
  local version state
  read -r version state <<< "$(about "$PYTHON")" || true
  case "$state" in
    fits) ;;
    new) say "Python $version: TensorFlow has no build for it, data is read without TensorFlow" >&2 ;;
    "") fail "PYTHON=$PYTHON does not run; name a Python 3.11 to 3.13" ;;
    old) fail "PYTHON=$PYTHON is Python $version, too old; name a Python 3.11 to 3.13" ;;
    *) fail "PYTHON=$PYTHON is of no use:$(objections "$version $state $PYTHON")" ;;
  esac
}

# Prints the Python to make the environment with.
find_python() {
  local seen found
  if [ -n "${PYTHON:-}" ]; then
    check_python
    echo "$PYTHON"
    return
  fi
  seen="$(survey)" || true
  found="$(fitting "$seen" | sed -n 1p)"
  if [ -z "$found" ]; then
    say "no Python 3.11 to 3.13 that can make environments is here: uv downloads 3.13" >&2
    found="uv $(uv_python)" && [ "$(about "${found#* }")" = "3.13 fits" ] ||
      fail "found no Python 3.11 to 3.13 that can make environments, and uv brought none (see above)." \
        "Install one, or name one with PYTHON=/path/to/python$(objections "$seen")"
  fi
  echo "${found#* }"
}

# Runs pip, with one retry, because a package index may be down for a moment. Shows the large downloads.
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

# Makes $VENV an environment with pip. An existing one stays, with any Python; one whose Python does not run (it was
# removed or replaced, or the installation was interrupted) is made again.
make_venv() {
  local python now clear=()
  now="$(about "$VENV/bin/python")" || true
  if "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then
    if [ -n "${PYTHON:-}" ] && [ -n "$now" ] && [ "$now" != "$(about "$PYTHON")" ]; then
      echo "$VENV is there, with Python ${now% *}, and stays: to use PYTHON=$PYTHON, remove it or set DALLE2_JAX_VENV" >&2
    fi
    return
  fi
  if [ -n "$now" ] && "$VENV/bin/python" -m ensurepip > /dev/null 2>&1; then # uv makes environments without pip
    return
  fi
  python="$(find_python)" || exit "${FAIL_STATUS:-1}"
  say "making an environment in $VENV with $("$python" --version)"
  if [ -z "$now" ] && [ -e "$VENV/pyvenv.cfg" ]; then
    clear=(--clear)
  fi
  "$python" -m venv ${clear[@]+"${clear[@]}"} "$VENV" || fail "$python -m venv $VENV failed; its lines above say why"
  "$VENV/bin/python" -m pip --version > /dev/null || fail "$VENV has no pip; remove it and run this again"
}

prepare() {
  local extras="$1${EXTRAS:+,$EXTRAS}" state stamp began=$SECONDS
  make_venv
  # A stamp for each set of extras has the state of the files that decide the installation.
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
  # TensorFlow only reads data here: no messages of its kernels
  export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}" TF_ENABLE_ONEDNN_OPTS="${TF_ENABLE_ONEDNN_OPTS:-0}"
  echo "environment: $VENV, $(python --version), ready after $((SECONDS - began)) s"
}

# For trainings: XLA's large buffers come from mmap and are page-faulted in anew at every step; with huge pages a step is
# a sixth faster.
huge_pages() {
  if [ "$(uname)" = Linux ]; then
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
  fi
}

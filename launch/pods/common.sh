# Sourced by the scripts in this folder: their arguments, and --dry-run.
#
#   --name=value ...   settings of the script, until --
#   -- ...             arguments of dalle2_jax.train
#   --dry-run          prints the commands without running them

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints the comment at the top of the script.
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"; }

# parse NAME=DEFAULT... -- ARGUMENTS...: sets the variable NAME for each --name=value (- becomes _), the array TRAIN to
# the arguments after --, and DRY. A default of ? marks a required argument.
parse() {
  local -A _settings=()
  local _word _key
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    _settings[${1%%=*}]=${1#*=}
    shift
  done
  shift
  DRY="" TRAIN=()
  while [ $# -gt 0 ]; do
    _word=$1
    shift
    case $_word in
      --) TRAIN=("$@") && break ;;
      --help | -h) usage && exit 0 ;;
      --dry-run) DRY=yes ;;
      --*=*)
        _key=${_word%%=*} _key=${_key#--} _key=${_key//-/_}
        [ -n "${_settings[$_key]+set}" ] || fail "there is no --${_key//_/-}; --help lists the settings"
        _settings[$_key]=${_word#*=}
        ;;
      *) fail "$_word is not --name=value; put the arguments of training after --" ;;
    esac
  done
  for _key in "${!_settings[@]}"; do
    [ "${_settings[$_key]}" != "?" ] || fail "give --${_key//_/-}=..."
    printf -v "$_key" '%s' "${_settings[$_key]}"
  done
}

# Checks the arguments of training before machines are rented.
check_training() {
  local need
  for need in --config= --workdir=; do
    [[ " ${TRAIN[*]} " == *" $need"* ]] || fail "training needs $need...: -- --config=configs/X.py --workdir=gs://..."
  done
}

need() { [ -n "$DRY" ] || command -v "$1" > /dev/null || fail "this needs $1, which is not installed"; }

# quoted WORD...: one line that a shell reads as these words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Runs a command, or prints it.
run() {
  if [ -n "$DRY" ]; then quoted "$@" && echo; else "$@"; fi
}

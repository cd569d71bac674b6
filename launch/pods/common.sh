# Sourced by the scripts beside it: their arguments, and showing what would be done instead of doing it.
#
#   --name=value ...   settings of the script, until --
#   -- ...             arguments of dalle2_jax.train, passed on untouched
#   --dry-run          prints the commands and does nothing

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints the comment at the top of the script.
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"; }

# parse NAME=DEFAULT... -- ARGUMENTS...: sets the variable NAME for each --name=value (- becomes _), the array TRAIN to
# what follows --, and DRY. A default of ? has to be given.
parse() {
  local -A _known=()
  local _word _key
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    _known[${1%%=*}]=${1#*=}
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
        [ -n "${_known[$_key]+set}" ] || fail "there is no --${_key//_/-}; --help says what there is"
        _known[$_key]=${_word#*=}
        ;;
      *) fail "$_word is not --name=value; arguments of training stand behind --" ;;
    esac
  done
  for _key in "${!_known[@]}"; do
    [ "${_known[$_key]}" != "?" ] || fail "give --${_key//_/-}=..."
    printf -v "$_key" '%s' "${_known[$_key]}"
  done
}

# Whether training would get what it needs, before anything is rented.
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

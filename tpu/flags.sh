# shellcheck shell=bash
# Owns the flags that launch.sh and gke.sh have in common: reading, checks, help. Sourced, not run.
# shellcheck source=tpu/types.sh
. "$(dirname "${BASH_SOURCE[0]}")/types.sh"

name='' type='' bucket='' slices=1 command=()

die() { echo "error: $*" >&2; exit 2; }

whole() {
  if [[ ! $2 =~ ^[0-9]+$ ]] || (($2 < $3)); then die "$1=$2: expected an integer >= $3"; fi
}

# Reads one flag that the script itself does not know.
shared_flag() {
  case $1 in
    --name=*) name=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    # The comment at the head of the script.
    -h | --help) sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
    *) die "$1: unknown option; options are given as --name=value, --help lists them" ;;
  esac
}

# Checks the flags above and the command; sets tpu_* of the type.
check_shared() {
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    die "--name=$name: expected lower-case letters, digits and dashes, a letter first"
  [[ -n $type ]] || die "--type: required: such as v5p-16"
  whole --slices "$slices" 1
  if [[ -n $bucket && ! $bucket =~ ^gs://[^/]+/?$ ]]; then
    die "--bucket=$bucket: expected gs://NAME"
  fi
  ((${#command[@]})) || die "no command: give it after --"
  tpu_type "$type" || exit 2
}

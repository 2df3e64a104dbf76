#!/usr/bin/env bash
# Owns the manifest of a run on GKE: fills tpu/jobset.yaml for a TPU type and prints it.
#
#   tpu/gke.sh --name=NAME --type=TYPE --image=IMAGE --bucket=gs://NAME [options] -- COMMAND... \
#     | kubectl apply -f -
#
#   --type=TYPE             v5e-16, v5p-32, v6e-16, tpu7x-32, ...
#   --image=IMAGE           built from tpu/Dockerfile
#   --bucket=gs://NAME      data/, runs/ and models/ of the command lie there (Cloud Storage FUSE)
#   --slices=N              slices of that type (1)
#   --spot                  on Spot nodes
#   --service-account=NAME  Kubernetes service account that may use the bucket (saro)
#   --max-restarts=N        of all hosts together, preemptions are counted too (20)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu/types.sh
. "$here/types.sh"

die() { echo "error: $*" >&2; exit 2; }

name='' type='' image='' bucket='' slices=1 spot=false account=saro restarts=20 command=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=true ;;
    --service-account=*) account=${1#*=} ;;
    --max-restarts=*) restarts=${1#*=} ;;
    -h | --help) sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --)
      shift
      command=("$@")
      break
      ;;
    *) die "$1: unknown option; options are given as --name=value, --help lists them" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  die "--name=$name: expected lower-case letters, digits and dashes, a letter first"
[[ -n $type ]] || die "--type: required: such as tpu7x-32"
[[ -n $image ]] || die "--image: required: what tpu/Dockerfile was built as"
[[ $bucket =~ ^gs://[^/]+/?$ ]] || die "--bucket=$bucket: expected gs://NAME"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices: expected an integer >= 1"
[[ $restarts =~ ^[0-9]+$ ]] || die "--max-restarts=$restarts: expected an integer >= 0"
((${#command[@]})) || die "no command: give it after --"
tpu_type "$type" || exit 2
bucket=${bucket#gs://} bucket=${bucket%/}

# The command as a JSON list, which YAML reads too; nothing in it is read by a shell.
args=''
for word in "${command[@]}"; do
  [[ $word != *$'\n'* ]] || die "the command: a word with a line break cannot be passed on"
  word=${word//\\/\\\\} word=${word//\"/\\\"}
  args+="${args:+, }\"$word\""
done

# In bash and not by sed: no character of a value is special.
while IFS= read -r line || [[ -n $line ]]; do
  [[ $spot == true || $line != *"# spot only"* ]] || continue
  line=${line//@NAME@/"$name"}
  line=${line//@IMAGE@/"$image"}
  line=${line//@BUCKET@/"$bucket"}
  line=${line//@SERVICE_ACCOUNT@/"$account"}
  line=${line//@SLICES@/"$slices"}
  line=${line//@HOSTS@/"$tpu_hosts"}
  line=${line//@CHIPS@/"$tpu_host_chips"}
  line=${line//@LABEL@/"$tpu_gke_label"}
  line=${line//@TOPOLOGY@/"$tpu_topology"}
  line=${line//@TYPE@/"$tpu_generation-${type##*-}"}
  line=${line//@RESTARTS@/"$restarts"}
  line=${line//@COMMAND@/"[$args]"}
  printf '%s\n' "$line"
done <"$here/jobset.yaml"

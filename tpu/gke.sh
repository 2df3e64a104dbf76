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
# shellcheck source=tpu/flags.sh
. "$here/flags.sh"

image='' spot=false account=saro restarts=20
while (($#)); do
  case $1 in
    --image=*) image=${1#*=} ;;
    --spot) spot=true ;;
    --service-account=*) account=${1#*=} ;;
    --max-restarts=*) restarts=${1#*=} ;;
    --)
      shift
      command=("$@")
      break
      ;;
    *) shared_flag "$1" ;;
  esac
  shift
done
check_shared
[[ -n $image ]] || die "--image: required: what tpu/Dockerfile was built as"
[[ -n $bucket ]] || die "--bucket: required: gs://NAME"
whole --max-restarts "$restarts" 0
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

#!/usr/bin/env bash
# Owns a run on Cloud TPUs, from your own machine: gets the TPU, sets it up, checks it, runs one
# command on every host, restarts it after a preemption, gathers the logs, and deletes the TPU.
#
#   tpu/launch.sh --name=NAME --zone=ZONE --type=TYPE [options] -- COMMAND...
#
#   --name=NAME         of the queued resource and its TPU VM; the same name attaches again
#   --zone=ZONE         such as us-east5-a; which zone has which type: tpu/README.md
#   --type=TYPE         v5e-8, v5p-16, v6e-16, ... (v5p counts TensorCores: v5p-16 is 8 chips)
#   --bucket=gs://NAME  mounted on every host: data/, runs/ and models/ lie there. A pod needs one
#   --project=ID        default: that of gcloud's configuration
#   --capacity=KIND     on-demand (default), spot or reserved
#   --slices=N          slices of that type, joined by the data-centre network (1)
#   --existing          NAME is a TPU VM that is there already: none is made or deleted
#   --env-file=FILE     NAME=VALUE lines for the command (HF_TOKEN, WANDB_API_KEY); copied, not shown
#   --logs=FOLDER       where logs go on this machine (runs/NAME-logs)
#   --max-failures=N    how often a failed run starts again (3); settings that the command refuses
#                       (exit code 2) never do
#   --max-preemptions=N how often a preempted one does (50)
#   --poll=SECONDS      between two looks at the run (60)
#   --delete            delete the TPU at the end, also after failures. Without it, it goes on costing
#   --create-flag=FLAG  one more flag for `queued-resources create`; may be repeated
#   --ssh-flag=FLAG     one more flag for `tpu-vm ssh` and `scp`; may be repeated
#   --dry-run           print every command of a run without trouble, run none
#
# COMMAND runs in the checkout of each host, with tpu/env.sh and the virtual environment, for
# example: python -m saro_jax.train --stage=rw --config=llama3.1_8b --out=runs/llama/rw
# It goes on without this script; the same command line attaches again. Exit codes: 0 complete,
# 2 the settings were refused, 1 anything else.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
# shellcheck source=tpu/flags.sh
. "$here/flags.sh"

zone='' project='' capacity=on-demand existing='' env_file='' logs=''
max_failures=3 max_preemptions=50 poll=60 delete='' dry_run='' create_flags=() ssh_flags=()
MOST_TRIES=5     # of one scp or ssh
LINGER=3         # polls that the other hosts get to end by themselves
UNREACHABLE=5    # polls in a row without an answer, after which the run counts as failed
BUSY=3           # exit code of `worker.sh start` where another command runs

say() { if [[ -n $dry_run ]]; then echo "$*" >&3; else echo "$(date +%H:%M:%S) $*" >&3; fi; }
exec 3>&1

parse() {
  while (($#)); do
    case $1 in
      --zone=*) zone=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --capacity=*) capacity=${1#*=} ;;
      --existing) existing=1 ;;
      --env-file=*) env_file=${1#*=} ;;
      --logs=*) logs=${1#*=} ;;
      --max-failures=*) max_failures=${1#*=} ;;
      --max-preemptions=*) max_preemptions=${1#*=} ;;
      --poll=*) poll=${1#*=} ;;
      --delete) delete=1 ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --ssh-flag=*) ssh_flags+=("${1#*=}") ;;
      --dry-run) dry_run=1 ;;
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
  [[ -n $zone ]] || die "--zone: required: such as us-east5-a"
  case $capacity in
    on-demand | spot | reserved) ;;
    *) die "--capacity=$capacity: expected on-demand, spot or reserved" ;;
  esac
  whole --max-failures "$max_failures" 0
  whole --max-preemptions "$max_preemptions" 0
  whole --poll "$poll" 0
  [[ -n $tpu_runtime ]] || die "--type=$type: only GKE offers it: use tpu/gke.sh"
  if ((tpu_hosts * slices > 1)) && [[ -z $bucket ]]; then
    die "--bucket: required: the $((tpu_hosts * slices)) hosts of $type write one checkpoint"
  fi
  [[ -z $env_file || -r $env_file ]] || die "--env-file=$env_file: cannot be read"
  [[ -z $existing || $slices == 1 ]] || die "--existing: has no meaning with --slices=$slices"
  logs=${logs:-runs/$name-logs}
}

# ---- commands ------------------------------------------------------------------------------------

# Words as a shell reads them back; plain ones stay as they are.
quoted() {
  local word line=''
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+="${line:+ }$word"
  done
  echo "$line"
}

# Runs "$@", or prints it. The only place that starts gcloud.
call() {
  if [[ -n $dry_run ]]; then
    echo "+ $(quoted "$@")" >&3
  else
    "$@"
  fi
}

gc() { call gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"}; }

pause() { if [[ -z $dry_run ]] && ((poll)); then sleep "$poll"; fi; }

# `ssh NODE WORKER COMMAND`; gcloud itself tries to connect for a minute.
ssh_to() {
  gc tpu-vm ssh "$1" "--worker=$2" "--command=$3" \
    ${ssh_flags[@]+"${ssh_flags[@]}"}
}

# Runs "$@" until it succeeds, MOST_TRIES times, as long as the TPU is there.
retry() {
  local try code
  for ((try = 1; ; try++)); do
    code=0
    "$@" || code=$?
    if ((code == 0)); then return 0; fi
    # worker.sh: something else runs there. The error is on the screen already.
    if ((code == BUSY)); then exit 2; fi
    say "failed ($try of $MOST_TRIES): $(quoted "${@:1:4}")"
    if ((try == MOST_TRIES)) || [[ $(state) != ACTIVE ]]; then return 1; fi
    pause
  done
}

# ---- the TPU -------------------------------------------------------------------------------------

# NONE, UNKNOWN (no answer) or the state of the queued resource.
state() {
  if [[ -n $dry_run ]]; then
    echo ACTIVE
    return
  fi
  local answer about=(queued-resources describe "$name" '--format=value(state.state)')
  if [[ -n $existing ]]; then about=(tpu-vm describe "$name" '--format=value(state)'); fi
  if answer=$(gc "${about[@]}" 2>"$tmp/describe"); then
    if [[ -n $existing && $answer == READY ]]; then answer=ACTIVE; fi
    echo "${answer:-UNKNOWN}"
  elif grep -qiE 'not[ _]found' "$tmp/describe"; then
    echo NONE
  else
    sed 's/^/  /' "$tmp/describe" >&3
    echo UNKNOWN
  fi
}

create() {
  local how=("--node-id=$name")
  if ((slices > 1)); then how=("--node-count=$slices" "--node-prefix=$name"); fi
  case $capacity in
    spot) how+=(--spot) ;;
    reserved) how+=(--reserved) ;;
  esac
  # The scope lets the hosts read and write the bucket, as far as their service account may.
  gc queued-resources create "$name" "${how[@]}" "--accelerator-type=$tpu_accelerator" \
    "--runtime-version=$tpu_runtime" --scopes=https://www.googleapis.com/auth/cloud-platform \
    ${create_flags[@]+"${create_flags[@]}"}
}

# --force also deletes the VM, --quiet asks nothing.
remove() { gc queued-resources delete "$name" --force --quiet; }

failures=0 preemptions=0 active_since='' active_seconds=0

note_failure() {
  failures=$((failures + 1))
  if ((failures > max_failures)); then
    say "given up after $failures failures (--max-failures=$max_failures): $1"
    finish 1
  fi
  say "failure $failures of $max_failures: $1"
}

note_preemption() {
  preemptions=$((preemptions + 1))
  if ((preemptions > max_preemptions)); then
    say "given up after $preemptions preemptions (--max-preemptions=$max_preemptions)"
    finish 1
  fi
  say "preempted ($preemptions of $max_preemptions): $1"
}

not_active() {
  if [[ -n $active_since ]]; then active_seconds=$((active_seconds + SECONDS - active_since)); fi
  active_since=''
}

# Returns when the TPU can be used; makes it, and makes it anew after SUSPENDED and FAILED.
ensure_active() {
  local now before='' made=''
  if [[ -n $dry_run ]]; then
    if [[ -z $existing ]]; then
      gc queued-resources describe "$name" '--format=value(state.state)'
      create
      say "every $poll s until it is ACTIVE:"
      gc queued-resources describe "$name" '--format=value(state.state)'
    else
      gc tpu-vm describe "$name" '--format=value(state)'
    fi
    return
  fi
  while :; do
    now=$(state)
    if [[ $now != "$before" ]]; then say "$name: $now"; fi
    before=$now
    if [[ $now == ACTIVE ]]; then
      active_since=${active_since:-$SECONDS}
      return
    fi
    not_active
    if [[ -n $existing ]]; then
      case $now in
        NONE | PREEMPTED | TERMINATED | STOPPED)
          say "--existing: $name is $now; this script makes no TPU VM"
          finish 1
          ;;
      esac
      pause
      continue
    fi
    case $now in
      NONE)
        say "asking for $capacity $tpu_accelerator in $zone"
        if create; then
          made=1
        else
          # What is wrong with a request stays wrong; right after a deletion it may not.
          if [[ -z $made ]] && ((preemptions + failures == 0)); then
            say "the request was refused"
            finish 1
          fi
          note_failure "the request was refused"
        fi
        before=''
        ;;
      SUSPENDED)
        note_preemption "$name is SUSPENDED"
        remove || say "could not delete $name yet"
        ;;
      FAILED)
        local why
        why=$(gc queued-resources describe "$name" '--format=value(state.failedData.error.message)') ||
          why=''
        note_failure "$name is FAILED: ${why:-no message}"
        remove || say "could not delete $name yet"
        ;;
    esac
    pause
  done
}

# The names of the TPU VMs, one a slice.
nodes() {
  if ((slices == 1)); then echo "$name"; else
    local slice
    for ((slice = 0; slice < slices; slice++)); do echo "$name-$slice"; done
  fi
}

# ---- the run -------------------------------------------------------------------------------------

# The checkout as it lies here: committed, changed and new files, not those that git ignores.
deploy() {
  local node archive=$tmp/saro_jax.tgz setup='bash saro_jax/tpu/setup.sh'
  if [[ -n $bucket ]]; then setup+=" --bucket=$bucket"; fi
  setup="mkdir -p saro_jax && tar -xzf saro_jax.tgz -C saro_jax && $setup"
  if [[ -z $dry_run ]]; then
    # Files that were removed but are still known to git are left out.
    (cd "$root" && git ls-files -co --exclude-standard | while IFS= read -r file; do
      if [[ -e $file ]]; then printf '%s\n' "$file"; fi
    done | tar -czf "$archive" -T -) || return 1
  else
    archive=saro_jax.tgz
  fi
  for node in $(nodes); do
    retry gc tpu-vm scp "$archive" "$node:saro_jax.tgz" --worker=all \
      ${ssh_flags[@]+"${ssh_flags[@]}"} || return 1
    if [[ -n $env_file ]]; then
      retry gc tpu-vm scp "$env_file" "$node:saro_jax.env" --worker=all \
        ${ssh_flags[@]+"${ssh_flags[@]}"} || return 1
    fi
    retry ssh_to "$node" all "$setup" || return 1
  done
}

start() {
  local node remote
  # `set -a` exports what the file sets.
  remote="if [ -f saro_jax.env ]; then chmod 600 saro_jax.env; set -a; . ./saro_jax.env; set +a; fi; "
  remote+="SARO_TPU_TYPE=$tpu_generation-${type##*-} SARO_TPU_SLICES=$slices "
  remote+="bash saro_jax/tpu/worker.sh start $job $(quoted "${command[@]}")"
  for node in $(nodes); do
    retry ssh_to "$node" all "$remote" || return 1
  done
}

on_all() {
  local node failed=0
  for node in $(nodes); do
    ssh_to "$node" all "bash saro_jax/tpu/worker.sh $*" || failed=1
  done
  return "$failed"
}

# Asks all hosts; prints the answers. Fails where not all of them answered.
ask() {
  if [[ -n $dry_run ]]; then on_all status "$job" && return; fi
  on_all status "$job" >"$tmp/answer" 2>"$tmp/answer_errors" || true
  grep '^saro-worker ' "$tmp/answer" || true
  [[ $(grep -c '^saro-worker ' "$tmp/answer") == "$((tpu_hosts * slices))" ]]
}

# Looks at the run until it ends; sets outcome (complete, refused, failed, stopped, gone) and why.
watch() {
  local answer lingered=0 silent=0 line host now code shown='' bad
  while :; do
    if ! answer=$(ask); then
      if [[ $(state) != ACTIVE ]]; then
        outcome=gone why="$name is no longer ACTIVE"
        return
      fi
      silent=$((silent + 1))
      say "not all hosts answered ($silent of $UNREACHABLE)"
      if ((silent >= UNREACHABLE)); then
        outcome=failed why="hosts do not answer"
        return
      fi
      pause
      continue
    fi
    silent=0
    if [[ -n $dry_run ]]; then
      outcome=complete why=''
      return
    fi
    local running=0 complete=0
    bad='' outcome=''
    while read -r _ host now code line; do
      case $now-$code in
        running-*)
          running=$((running + 1))
          line=${line#| }
          ;;
        exited-0) complete=$((complete + 1)) ;;
        exited-2) outcome=refused bad+="${bad:+, }$host: exit code 2" ;;
        exited-130 | exited-143)
          if [[ $outcome != refused && $outcome != failed ]]; then outcome=stopped; fi
          bad+="${bad:+, }$host: exit code $code"
          ;;
        *)
          if [[ $outcome != refused ]]; then outcome=failed; fi
          bad+="${bad:+, }$host: $now${code:+ $code}"
          ;;
      esac
    done <<<"$answer"
    # The first host speaks for all.
    line=$(head -n 1 <<<"$answer")
    line=${line#*| }
    if [[ $line != "$shown" ]]; then say "$line"; fi
    shown=$line
    if [[ -z $bad && $running == 0 ]]; then
      outcome=complete why=''
      return
    fi
    why=$bad
    if [[ -n $bad ]]; then
      # One host left: the others follow, by the same signal or because it is missing.
      if ((lingered == 0)); then say "$bad; $running still running, $complete complete"; fi
      lingered=$((lingered + 1))
      if ((running == 0 || lingered > LINGER)); then return; fi
    fi
    pause
  done
}

# Each host's log to LOGS/attempt-N/NODE-W.log; a log that cannot be had is no error.
gather() {
  local node worker folder=$logs/attempt-$1
  say "logs: $folder"
  if [[ -z $dry_run ]]; then mkdir -p "$folder"; fi
  for node in $(nodes); do
    for ((worker = 0; worker < tpu_hosts; worker++)); do
      if [[ -n $dry_run ]]; then
        ssh_to "$node" "$worker" "bash saro_jax/tpu/worker.sh log $job"
        continue
      fi
      ssh_to "$node" "$worker" "bash saro_jax/tpu/worker.sh log $job" \
        >"$folder/$node-$worker.log" 2>"$tmp/log_errors-$node-$worker" &
      if ((worker % 16 == 15)); then wait; fi
    done
    wait
  done
}

finish() {
  trap - INT TERM
  not_active
  if [[ -z $dry_run ]]; then
    awk -v s="$active_seconds" -v chips="$((tpu_chips * slices))" -v at="$(date +%H:%M:%S)" 'BEGIN {
      printf "%s the TPU was ACTIVE for %.2f h under this script: %.1f chip-hours\n",
        at, s / 3600, s / 3600 * chips }' >&3
  fi
  if [[ -n $delete && -z $existing ]]; then
    say "deleting $name"
    remove || say "could NOT delete $name: it goes on costing; delete it by hand"
  elif [[ -n $existing || $(state) != NONE ]]; then
    say "$name is still there and costs money; to delete it:"
    if [[ -n $existing ]]; then
      say "  gcloud compute tpus tpu-vm delete $name --zone=$zone${project:+ --project=$project}"
    else
      say "  gcloud compute tpus queued-resources delete $name --force --zone=$zone${project:+ --project=$project}"
    fi
  fi
  exit "$1"
}

leave() {
  say "this script ends, the run goes on; the same command line attaches again; to stop the run:"
  say "  gcloud compute tpus tpu-vm ssh $name --worker=all --zone=$zone --command='bash saro_jax/tpu/worker.sh stop $job'"
  exit 130
}

main() {
  parse "$@"
  tmp=$(mktemp -d)
  trap 'rm -rf "$tmp"' EXIT
  trap leave INT TERM
  # The job is named after the command, so that another command is another job.
  job=$name-$(quoted "${command[@]}" | cksum | cut -d ' ' -f 1)
  say "$tpu_accelerator: $((tpu_chips * slices)) chips, $((tpu_hosts * slices)) hosts," \
    "topology $tpu_topology; costs $((tpu_chips * slices)) x hours x price of a chip-hour:" \
    "https://cloud.google.com/tpu/pricing"
  if ((tpu_hosts * slices > 1)) && [[ -z $dry_run ]] && ! ssh-add -l >/dev/null 2>&1; then
    say "note: several hosts need an ssh agent with gcloud's key, else each asks for it:" \
      "eval \"\$(ssh-agent)\"; ssh-add ~/.ssh/google_compute_engine"
  fi
  local attempt=0 answer
  outcome='' why=''
  while :; do
    attempt=$((attempt + 1))
    ensure_active
    if ((attempt == 1)) && [[ -z $dry_run ]] && answer=$(ask) &&
      ! grep -qvE '^saro-worker [^ ]+ running ' <<<"$answer"; then
      say "the run goes on there: attached"
    else
      say "setting up"
      if ! deploy || ! start; then
        # Where the TPU went away, ensure_active counts that.
        if [[ $(state) == ACTIVE ]]; then note_failure "it could not be set up"; fi
        pause
        continue
      fi
      say "started"
    fi
    watch
    if [[ $outcome != gone ]]; then gather "$attempt"; fi
    case $outcome in
      complete)
        say "complete"
        finish 0
        ;;
      refused)
        say "the settings were refused, starting again changes nothing: $why"
        finish 2
        ;;
      gone) say "$why" ;;
      stopped)
        # By a preemption, which the state says sooner or later, or by hand.
        local polls
        for ((polls = 0; polls < LINGER; polls++)); do
          if [[ $(state) != ACTIVE ]]; then break; fi
          pause
        done
        if [[ $(state) == ACTIVE ]]; then note_preemption "stopped by a signal: $why"; fi
        on_all stop "$job" >/dev/null 2>&1 || true
        ;;
      failed)
        note_failure "$why"
        on_all stop "$job" >/dev/null 2>&1 || true
        ;;
    esac
  done
}

main "$@"

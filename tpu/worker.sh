#!/usr/bin/env bash
# Owns one host's part of a run: starts the command there, reports, stops, frees the chips.
#
#   worker.sh start JOB COMMAND...   in the background; survives the end of the ssh session
#   worker.sh status JOB             one line: saro-worker HOST STATE CODE | last line of the log
#                                    STATE: running, exited (CODE), lost (died without a code), absent
#   worker.sh stop JOB [SECONDS]     SIGTERM (save and leave), SIGKILL after SECONDS (default 60)
#   worker.sh log JOB                all it printed
#   worker.sh run COMMAND...         in the foreground: preflight, then the command; passes SIGTERM
#                                    on, so it can be process 1 of a container
#
# launch.sh calls it by ssh on every host at once. SARO_PREFLIGHT=0 leaves the preflight out.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
jobs=${SARO_JOBS:-$HOME/saro_jobs}
PREFLIGHT_FAILED=4 # exit code

# After a reboot the number may be another process's.
alive() {
  [[ -s $jobs/$1/pid ]] && grep -qs worker.sh "/proc/$(cat "$jobs/$1/pid")/cmdline"
}

# Runs "$@" to its end and returns its exit code. SIGTERM, which is for the command and not for this
# script, is passed on once where nothing else tells the command: a second one would kill it before
# it has saved.
attend() {
  local code told=0 early=0 child=
  # Before the command starts: a signal right after would end this script and leave the command.
  if [[ -n ${SARO_JOB:-} ]]; then
    # In the background: `stop` tells the command itself, and a machine that goes down tells all.
    trap 'told=1' TERM
  else
    trap 'told=1; if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; else early=1; fi' TERM INT
  fi
  "$@" &
  child=$!
  if ((early)); then kill -TERM "$child" 2>/dev/null || true; fi
  if [[ -n ${SARO_JOB:-} ]]; then echo "$child" >"$SARO_JOB/command_pid"; fi
  while :; do
    code=0
    wait "$child" || code=$?
    # A signal ends `wait`, not the child: wait again.
    if ((told)); then told=0; else break; fi
  done
  trap - TERM INT
  return "$code"
}

run() {
  cd "$root"
  # shellcheck source=tpu/env.sh
  . "$here/env.sh"
  if [[ -d $root/.venv/bin ]]; then PATH=$root/.venv/bin:$PATH; fi
  if [[ ${SARO_PREFLIGHT:-1} != 0 ]]; then
    local code=0 word settings=()
    # Training's own settings: that they are the same on all hosts, and fit the chips.
    if [[ "${*:1:3}" == "python -m saro_jax.train" ]]; then
      for word in "${@:4}"; do
        if [[ $word != --dry-run ]]; then settings+=("$word"); fi
      done
    fi
    attend python -m saro_jax.parallel.preflight ${settings[@]+"${settings[@]}"} || code=$?
    if ((code)); then
      echo "preflight: exit code $code on $(hostname); the command was not started"
      # 2 means settings that are wrong for good; a host that differs may be right the next time.
      if ((code == 2)); then code=$PREFLIGHT_FAILED; fi
      return "$code"
    fi
  fi
  attend "$@"
}

# What `start` leaves in the background. The code is written last, under another name and moved, so
# that nobody reads half of it.
background() {
  export SARO_JOB=$jobs/$1
  shift
  local code=0
  (run "$@") || code=$?
  echo "$code" >"$SARO_JOB/exit.new"
  mv "$SARO_JOB/exit.new" "$SARO_JOB/exit"
}

# A process that died may still be held by the driver, and its lock file refuses the next one.
free_chips() {
  local device lock=${SARO_LIBTPU_LOCK:-/tmp/libtpu_lockfile}
  for device in /dev/accel* /dev/vfio/*; do
    if [[ -e $device ]]; then sudo fuser -k -KILL "$device" >/dev/null 2>&1 || true; fi
  done
  if [[ -e $lock ]]; then rm -f "$lock" 2>/dev/null || sudo rm -f "$lock"; fi
}

start() {
  local job=$1 other
  shift
  if alive "$job"; then
    echo "$(hostname): already running"
    return 0
  fi
  for other in "$jobs"/*/; do
    other=$(basename "$other")
    if [[ -d $jobs/$other ]] && alive "$other"; then
      echo "error: $(hostname): $other is running; stop it: tpu/worker.sh stop $other" >&2
      return 3
    fi
  done
  free_chips
  rm -rf "${jobs:?}/$job"
  mkdir -p "$jobs/$job"
  # setsid: a session of its own, so that the end of ssh does not end it.
  setsid nohup "$here/worker.sh" background "$job" "$@" >"$jobs/$job/log" 2>&1 </dev/null &
  echo $! >"$jobs/$job/pid"
  echo "$(hostname): started"
}

status() {
  local dir=$jobs/$1 state=absent code=-
  if [[ -s $dir/exit ]]; then
    state=exited code=$(cat "$dir/exit")
  elif alive "$1"; then
    state=running
  elif [[ -d $dir ]]; then
    # Between the two looks above it may have ended.
    state=lost
    if [[ -s $dir/exit ]]; then state=exited code=$(cat "$dir/exit"); fi
  fi
  echo "saro-worker $(hostname) $state $code | $(tail -n 1 "$dir/log" 2>/dev/null | cut -c 1-200)"
}

stop() {
  local job=$1 seconds=${2:-60}
  if alive "$job"; then
    kill -TERM "$(cat "$jobs/$job/command_pid")" 2>/dev/null || true
    while ((seconds-- > 0)) && alive "$job"; do sleep 1; done
    # The whole group: the command may have children.
    if alive "$job"; then kill -KILL -- "-$(cat "$jobs/$job/pid")" 2>/dev/null || true; fi
  fi
  status "$job"
}

main() {
  local action=${1:-}
  if (($#)); then shift; fi
  case $action in
    run) run "$@" ;;
    background) background "$@" ;;
    start) start "$@" ;;
    status) status "$@" ;;
    stop) stop "$@" ;;
    log) cat "$jobs/$1/log" ;;
    *)
      echo "error: worker.sh: expected run, start, status, stop or log, got '$action'" >&2
      return 2
      ;;
  esac
}

main "$@"

#!/usr/bin/env bash
# Sees a run through to its end: starts it, and after a preemption asks for new TPUs and goes on.
#   SPOT=yes launch/resume.sh --config=configs/llama8b.py --config.workdir=gs://bucket/run ...
# The workdir must be a bucket: the disks of a TPU VM go with it.
source "$(dirname "$0")/settings.sh"
(($#)) || { echo 'give the arguments of dpo_flax.train' >&2; exit 2; }

here=$(dirname "$0")
readonly MAX_CRASHES=3 # since the last preemption
crashes=0
started='' # by this call, or seen running: an exit code from before is none of this run's

# The exit code of worker 0, or `running`, or `stopped`, or `unknown` while it is out of reach.
progress() {
  # shellcheck disable=SC2016 # expanded there
  ASSUMED=$1 tpus ssh "$NAME" --command='cd dpo_flax 2>/dev/null || { echo stopped; exit; }
if [ -e exit_code ]; then cat exit_code
elif [ -e pid ] && kill -0 "$(cat pid)" 2>/dev/null; then echo running
else echo stopped; fi' || echo unknown
}

anew() {
  if [[ $1 != NONE ]]; then
    tpus delete "$NAME" --force --quiet
  fi
  "$here/create.sh" && "$here/run.sh" "${@:2}"
}

while :; do
  now=$(state SUSPENDED) || now=unknown
  case $now in
    NONE | SUSPENDED | FAILED)
      echo "$NAME: $now: starting anew"
      crashes=0
      if anew "$now" "$@"; then started=yes; else echo "$NAME: that failed; trying again"; fi
      ;;
    ACTIVE)
      how=$(progress running)
      if [[ $how == running ]]; then
        started=yes
      elif [[ $how != unknown && ! $started ]]; then
        "$here/run.sh" "$@" && started=yes
      elif [[ $how == 0 ]]; then
        echo "$NAME: the run has ended; launch/delete.sh stops the costs"
        exit 0
      elif [[ $how == 2 ]]; then
        echo "$NAME: the run was refused; see launch/logs.sh" >&2
        exit 2
      elif [[ $how != unknown ]]; then
        # Told to stop (SIGTERM), which is no crash: 75, or 143 while Python starts.
        [[ $how == 75 || $how == 143 ]] || ((++crashes <= MAX_CRASHES)) || { echo "$NAME: crashed again ($how)" >&2; exit 1; }
        echo "$NAME: $how: starting again"
        "$here/run.sh" "$@" || true
      fi
      ;;
  esac
  if [[ $DRY_RUN ]]; then
    exit 0
  fi
  sleep "$POLL"
done

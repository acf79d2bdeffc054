# shellcheck shell=bash
# What the other scripts share: settings from the environment, and how they call Google Cloud.

set -euo pipefail

DRY_RUN=${DRY_RUN:-} # set by --dry-run: print every command instead of calling it
arguments=()
for argument; do
  case $argument in
    --dry-run) DRY_RUN=yes ;;
    --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
    *) arguments+=("$argument") ;;
  esac
done
set -- "${arguments[@]}" # those of the script
export DRY_RUN

NAME=${NAME:?set NAME, of the queued resource}
ZONE=${ZONE:?set ZONE, such as us-west4-a}
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # the VM image that belongs to TPU_TYPE
SLICES=${SLICES:-1}
SPOT=${SPOT:-}        # not empty: cheaper, and taken away at any time
POLL=${POLL:-60}      # seconds between two looks at a state
readonly NAME ZONE TPU_TYPE RUNTIME SLICES SPOT POLL

# Ends a script that would do something other than it was asked for.
refuse_arguments() {
  (($# == 0)) || { echo "$(basename "$0") takes no argument but --dry-run: $*" >&2; exit 2; }
}

show() {
  printf '%q ' "$@"
  echo
}

# Calls a command, or prints it.
call() {
  if [[ $DRY_RUN ]]; then
    show "$@"
  else
    "$@"
  fi
}

# Prints the output of a command; of a dry run, the first argument.
ask() {
  local assumed=$1
  shift
  if [[ $DRY_RUN ]]; then
    show "$@" >&2
    echo "$assumed"
  else
    "$@"
  fi
}

# tpus VERB ARGUMENT...: what `gcloud compute tpus queued-resources` does to ours.
tpus() {
  local verb=$1
  shift
  set -- gcloud compute tpus queued-resources "$verb" "$@" --zone="$ZONE"
  if [[ ${ASSUMED+set} ]]; then
    ask "$ASSUMED" "$@"
  else
    call "$@"
  fi
}

# The state of the queued resource, NONE where there is none; of a dry run, the first argument.
state() {
  local found
  found=$(ASSUMED=$1 tpus list --filter="name~/$NAME\$" --format='value(state.state)') || return
  echo "${found:-NONE}"
}

on_all_workers() {
  tpus ssh "$NAME" --node=all --worker=all --command="$1"
}

#!/usr/bin/env bash
# Follows what the run says. Worker 0 alone writes; WORKER=1 NODE=0 shows the errors of another.
source "$(dirname "$0")/settings.sh"
refuse_arguments "$@"

tpus ssh "$NAME" --node="${NODE:-0}" --worker="${WORKER:-0}" \
  --command='tail -n 100 -F dpo_flax/run.log'

#!/usr/bin/env bash
# Asks for the TPUs and waits until they are there: NAME=my-run ZONE=us-west4-a launch/create.sh
source "$(dirname "$0")/settings.sh"
refuse_arguments "$@"

nodes=(--node-id="$NAME")
if ((SLICES > 1)); then
  nodes=(--node-count="$SLICES" --node-prefix="$NAME")
fi
tpus create "$NAME" "${nodes[@]}" \
  --accelerator-type="$TPU_TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}

while :; do
  now=$(state ACTIVE)
  echo "$NAME: $now"
  case $now in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING | NONE) exit 1 ;;
  esac
  sleep "$POLL"
done

#!/usr/bin/env bash
# Gives the TPUs back, with their disks: the costs end here. What is in buckets stays.
source "$(dirname "$0")/settings.sh"
refuse_arguments "$@"

tpus delete "$NAME" --force

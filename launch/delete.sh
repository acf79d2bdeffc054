#!/usr/bin/env bash
# Gives the TPUs back, with their disks: the costs end here. What is in buckets stays.
source "$(dirname "$0")/settings.sh"

tpus delete "$NAME" --force

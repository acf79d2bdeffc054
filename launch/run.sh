#!/usr/bin/env bash
# Copies this tree to all workers and starts the same command on each, in the background:
#   launch/run.sh --config=configs/llama8b.py --config.workdir=gs://bucket/run ...
# A run that is still going there is stopped first; from its last checkpoint the new one goes on.
source "$(dirname "$0")/settings.sh"
(($#)) || { echo 'give the arguments of dpo_flax.train' >&2; exit 2; }

root=$(cd "$(dirname "$0")/.." && pwd)
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
call tar -czf "$archive" -C "$root" --exclude=__pycache__ dpo_flax configs pyproject.toml README.md
tpus scp "$archive" "$NAME:dpo_flax.tar.gz" --node=all --worker=all

# The VM's own Python is too old; uv brings one.
# shellcheck disable=SC2016 # expanded there
on_all_workers 'set -e
mkdir -p dpo_flax && cd dpo_flax && tar -xzf ../dpo_flax.tar.gz
if [ -e pid ] && kill -- "-$(cat pid)" 2>/dev/null; then
  # It saves before it ends, and holds its workdir until then.
  for _ in $(seq 30); do kill -0 -- "-$(cat pid)" 2>/dev/null || break; sleep 1; done
fi
python3 -m pip install --quiet --user uv
[ -d venv ] || python3 -m uv venv --quiet --python 3.12 venv
python3 -m uv pip install --quiet --python venv/bin/python -e ".[tpu,gcs]"'

# Once for the shell inside the background job, once for the one that ssh starts.
printf -v train '%q ' venv/bin/python -m dpo_flax.train "$@"
printf -v job '%q' "$train; echo \$? > exit_code"
on_all_workers "cd dpo_flax && rm -f exit_code
nohup setsid bash -c $job > run.log 2>&1 < /dev/null & echo \$! > pid"

#!/usr/bin/env bash
# Stop the cluster that start.sh started in DIR, and nothing else. The script finds its daemons by their pid files, and checks that
# their command lines contain DIR.
#   slurm/local-cluster/stop.sh DIR
set -euo pipefail

dir=$(cd "$1" && pwd -P)
export SLURM_CONF=$dir/slurm.conf

if timeout 5 scontrol ping >/dev/null 2>&1; then
  timeout 10 scancel --user "$(id -un)" || true
  for ((try = 0; try < 40; try++)); do # a cancelled job gets KillWait seconds before SLURM kills it
    [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ] && break
    sleep 0.2
  done
fi

is_gone() { [ ! -e "/proc/$1" ] || [ "$(cut -d' ' -f3 "/proc/$1/stat" 2>/dev/null)" = Z ]; }

for file in "$dir"/pids/slurmd.*.pid "$dir"/pids/slurmctld.pid "$dir"/pids/munged.pid; do
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$dir/" || continue # another process has this pid now
  kill "$pid"
  for ((try = 0; try < 50; try++)); do
    is_gone "$pid" && break
    sleep 0.1
  done
  is_gone "$pid" || kill -9 "$pid"
done

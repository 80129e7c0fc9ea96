#!/usr/bin/env bash
# Give the Slurm driver's tests a Slurm to start: install Debian's where that is ours to do (root, with apt), else say how.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
if command -v slurmctld slurmd munged sbatch >/dev/null; then exit 0; fi
if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "Installing Slurm and MUNGE for the Slurm driver's tests; they start private clusters of their own."
    export DEBIAN_FRONTEND=noninteractive
    if { apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge; } >/dev/null; then exit 0; fi
fi
echo "No Slurm: the Slurm driver's tests will be skipped. On Debian: sudo apt-get install slurm-wlm munge"

#!/usr/bin/env bash
# Give the tests the real parts that pip does not bring. Each is installed where that is ours to do (root, with
# apt); where it is not, the tests that need it are skipped, and this says how to get it.
set -euo pipefail

missing=()
need() { # COMMANDS (any of them will do, split by |) PACKAGES WHAT
    local command
    for command in ${1//|/ }; do
        if command -v "$command" >/dev/null || [[ -x /usr/sbin/$command ]]; then return; fi
    done
    missing+=("$2")
    echo "Missing for the tests: $3."
}

need "chromium|chromium-browser|google-chrome" chromium "a browser, for the portal"
need bwrap bubblewrap "bubblewrap, for the sandbox"
need slurmctld slurm-wlm "Slurm, for the Slurm driver: its tests start private clusters"
need munged munge "MUNGE, for Slurm"
need ip iproute2 "ip, for the laboratory's network"
need iptables iptables "iptables, for the laboratory's network"

if ((${#missing[@]} == 0)); then exit 0; fi
if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "Installing ${missing[*]}."
    export DEBIAN_FRONTEND=noninteractive
    if { apt-get update -qq && apt-get install -qq -y --no-install-recommends ${missing[*]}; } >/dev/null; then exit 0; fi
fi
echo "The tests that need them will be skipped. On Debian: sudo apt-get install ${missing[*]}"

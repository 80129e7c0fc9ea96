#!/usr/bin/env bash
# Give the sandbox's tests bubblewrap: install Debian's where that is ours to do (root, with apt), else say how.
set -euo pipefail

if command -v bwrap >/dev/null; then exit 0; fi
if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "Installing bubblewrap for the sandbox's tests."
    export DEBIAN_FRONTEND=noninteractive
    if { apt-get update -qq && apt-get install -qq -y --no-install-recommends bubblewrap; } >/dev/null; then exit 0; fi
fi
echo "No bubblewrap: the sandbox's tests will be skipped. On Debian: sudo apt-get install bubblewrap"

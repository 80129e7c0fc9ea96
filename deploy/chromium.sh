#!/usr/bin/env bash
# Give the portal's tests a browser: install Debian's Chromium where that is ours to do (root, with apt), else say how.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "Installing Chromium for the portal's tests."
    export DEBIAN_FRONTEND=noninteractive
    if { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null; then exit 0; fi
fi
echo "No Chromium: the portal's browser tests will be skipped. On Debian: sudo apt-get install chromium"

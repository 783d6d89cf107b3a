#!/usr/bin/env bash
# Installs Debian's Chromium, for the tests of the page (needs apt-get and root).
set -euo pipefail

! command -v chromium >/dev/null || exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium

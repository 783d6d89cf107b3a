#!/usr/bin/env bash
# Installs Debian's docker-registry, for the tests of mirrors in an OCI registry (needs apt-get and root).
set -euo pipefail

! command -v docker-registry >/dev/null || exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker-registry

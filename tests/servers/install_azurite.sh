#!/usr/bin/env bash
# Installs Azurite, for the tests of object stores, into .servers/ beside launch.sh (needs node and npm).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

version=3.37.0
found=$(node -p 'require("./.servers/node_modules/azurite/package.json").version' 2>/dev/null) || found=
[ "$found" != "$version" ] || exit 0
mkdir -p .servers
npm install --prefix .servers --no-audit --no-fund --no-save --loglevel=error "azurite@$version"

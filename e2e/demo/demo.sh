#!/usr/bin/env bash
# Shows the purpose of kleidi on a simulated machine. Run it with `make demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
go build -o bin/demo ./e2e/demo
exec bin/demo bin/kleidi

#!/usr/bin/env bash
# Shows what kleidi is for, on a simulated machine. Run it with `make demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
go build -o bin/demo ./e2e/demo
exec bin/demo bin/kleidi

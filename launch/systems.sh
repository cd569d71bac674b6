#!/usr/bin/env bash
# Trains the tiny recipe of each named system from nothing, makes a model, draws and measures it, and adds its row to a
# table; see benchmarks/systems.py.
#
#   bash launch/systems.sh dalle2 clip ddpm iddpm adm cfg glide imagen vqvae vqvae2 dalle1
#
# Everything is written to systems/ in the repository, or to SYSTEMS_DIR. The same command goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"
prepare train,eval
huge_pages
exec python -m benchmarks.systems --out="${SYSTEMS_DIR:-systems}" "$@"

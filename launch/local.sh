#!/usr/bin/env bash
# Install moetrain into .venv and train any recipe on this machine: launch/local.sh recipe=nano_moe router.top_k=4
# NPROC: ranks; by default one a GPU, or 2 where there is none. A mistake is told once, before any rank starts: exit 2.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "$0")/environment.sh"

install .
gpus=$(num_gpus)
nproc=${NPROC:-$((gpus > 0 ? gpus : 2))}
threads "$nproc"
python -m moetrain check "$@" --world "$nproc" >/dev/null
exec torchrun --standalone --nproc-per-node "$nproc" -m moetrain train "$@"

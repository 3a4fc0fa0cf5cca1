#!/usr/bin/env bash
# Install moetrain into .venv and train the quick-start on 2 ranks, each with half of the experts.
# Arguments are Hydra overrides: launch/quickstart.sh train.steps=100 monitor=wandb_offline
# NPROC: ranks; by default 2, or 1 where there is one GPU. PYTHON: the interpreter to make .venv with.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "$0")/environment.sh"

export NPROC="${NPROC:-$(($(num_gpus) == 1 ? 1 : 2))}"
exec launch/local.sh recipe=quickstart "$@"

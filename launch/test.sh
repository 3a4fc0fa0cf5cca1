#!/usr/bin/env bash
# Install moetrain with its test extra into .venv and run the tests. Arguments are pytest's: launch/test.sh -k routing -x
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "$0")/environment.sh"

install '.[test]'
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # of each of the two processes
exec python -m pytest --numprocesses 2 --dist loadfile "$@"

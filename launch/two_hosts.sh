#!/usr/bin/env bash
# Train on two hosts (or NODES of them): run the same command on each, only NODE_RANK differs.
#
#   NODE_RANK=0 MASTER=10.0.0.1 INTERFACE=eth0 launch/two_hosts.sh recipe=quickstart     on the host that has 10.0.0.1
#   NODE_RANK=1 MASTER=10.0.0.1 INTERFACE=eth0 launch/two_hosts.sh recipe=quickstart     on the other
#
# NPROC: ranks a host; by default one a GPU, or 1. PORT: free on MASTER (29400). The checkout must be on every host; the
# run folder is written by rank 0, and checkpoints by all ranks, so run.root should be on storage that all hosts share.
#
# NODES=1:2, with run.elastic=true and run.id=NAME: host 1 may be lost, and come back. Those that are left start again by
# themselves (at most RESTARTS times, 3) from the newest checkpoint; not without host 0, which holds the rendezvous.
# RDZV_CONF: more of torchrun's --rdzv-conf, such as last_call_timeout=5, the seconds that others are waited for (30).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "$0")/environment.sh"

for name in NODE_RANK MASTER INTERFACE; do
  [ -n "${!name:-}" ] || fail "$name is not set. Usage: NODE_RANK=0 MASTER=10.0.0.1 INTERFACE=eth0 $0 [override ...]"
done
address=$(ip -4 -oneline address show dev "$INTERFACE" | awk '{ split($4, a, "/"); print a[1]; exit }') || true
[ -n "$address" ] || fail "INTERFACE=$INTERFACE has no IPv4 address on this host. Those that have: $(ip -4 -brief address)"

install .
nodes=${NODES:-2}
elastic=()
if [ "$nodes" != "${nodes#*:}" ]; then
  case " $* " in *" run.id="*) ;; *) fail "NODES=$nodes needs run.id=NAME, by which a restart finds the run again." ;; esac
  elastic=(--max-restarts "${RESTARTS:-3}")
  # torch 2.13 tells a host that comes later no address if agents share their store: it waits, and all fail.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
gpus=$(num_gpus)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
threads "$nproc"
python -m moetrain check "$@" --world "$((${nodes#*:} * nproc))" >/dev/null
if [ "${#elastic[@]}" -gt 0 ]; then
  python -m moetrain check "$@" --world "$((${nodes%:*} * nproc))" >/dev/null
fi

# Many systems give their own host name the address 127.0.1.1, which no other host can reach. So say who opens the
# rendezvous (is_host), under which address this host is known (local-addr), and over which interface ranks connect.
export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"
exec torchrun --nnodes "$nodes" --nproc-per-node "$nproc" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER:${PORT:-29400}" \
  --rdzv-conf "is_host=$((NODE_RANK == 0))${RDZV_CONF:+,$RDZV_CONF}" \
  --local-addr "$address" "${elastic[@]}" -m moetrain train "$@"

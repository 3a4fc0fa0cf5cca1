#!/usr/bin/env bash
# Pretend hosts on one machine: netns.sh NODES COMMAND... runs the command once in each of NODES network namespaces that
# are joined by a bridge, with NODE_RANK, MASTER and INTERFACE set. Exits with 0 if all did. Needs root and iproute2.
#
# RATE: what a host may send, and what it may be sent, such as 200mbit; by default there is no limit.
#
# Each host resolves its own name to 127.0.1.1, as Debian and Ubuntu set it up: whoever relies on that name is not reached.
set -euo pipefail

nodes=$1
shift
tag=mt$$
pids=()

# shellcheck disable=SC2317 # called by the trap
cleanup() {
  local i
  for ((i = 0; i < nodes; i++)); do
    ip netns pids "$tag-$i" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
    ip netns del "$tag-$i" 2>/dev/null || true
    rm -rf "/etc/netns/$tag-$i"
  done
  ip link del "$tag" 2>/dev/null || true
}
trap cleanup EXIT
trap 'exit 143' INT TERM

ip link add "$tag" type bridge
ip link set "$tag" up
for ((i = 0; i < nodes; i++)); do
  ns=$tag-$i
  ip netns add "$ns"
  ip link add "$tag.$i" type veth peer name eth0 netns "$ns"
  ip link set "$tag.$i" master "$tag" up
  ip -n "$ns" address add "10.78.0.$((i + 1))/24" dev eth0
  ip -n "$ns" link set lo up
  ip -n "$ns" link set eth0 up
  if [ -n "${RATE:-}" ]; then
    tc qdisc add dev "$tag.$i" root tbf rate "$RATE" burst 256kb latency 100ms
    tc -n "$ns" qdisc add dev eth0 root tbf rate "$RATE" burst 256kb latency 100ms
  fi
  mkdir -p "/etc/netns/$ns"
  printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$(hostname)" >"/etc/netns/$ns/hosts"
  : >"/etc/netns/$ns/resolv.conf" # no name server: look-ups fail at once
done
for ((i = 0; i < nodes; i++)); do
  NODE_RANK=$i MASTER=10.78.0.1 INTERFACE=eth0 ip netns exec "$tag-$i" "$@" > >(sed -u "s/^/[host $i] /") 2>&1 &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"

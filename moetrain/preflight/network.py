"""Whether host names and interfaces are what the libraries of process groups will look for.

gloo connects to the address of ``GLOO_SOCKET_IFNAME`` or, without it, to what the host's own name resolves to, which
Debian and Ubuntu set to 127.0.1.1: no other host reaches it. NCCL chooses among the interfaces that
``NCCL_SOCKET_IFNAME`` admits.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from moetrain.preflight.findings import Finding, ranks

LOOK_UP_S = 5.0
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


@dataclass(frozen=True)
class Place:
    """Where a rank runs. addresses, master_addresses: what the names resolve to, [] for nothing within LOOK_UP_S.

    several_hosts: as far as torchrun says. uses_gloo: as opposed to NCCL. first_host: the one that the master is on.
    """

    host: str
    addresses: list[str]
    interfaces: list[str]
    gloo: str
    nccl: str
    master: str
    master_addresses: list[str]
    several_hosts: bool
    first_host: bool
    uses_gloo: bool


def place(device_type: str) -> Place:
    """Look around on this host."""
    host, master = socket.gethostname(), os.environ.get("MASTER_ADDR", "")
    world, local = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE")
    return Place(
        host=host,
        addresses=_addresses(host),
        interfaces=[name for _, name in socket.if_nameindex()],
        gloo=os.environ.get(GLOO, ""),
        nccl=os.environ.get(NCCL, ""),
        master=master,
        master_addresses=_addresses(master) if master else [],
        several_hosts=local is not None and local != world,
        first_host=os.environ.get("GROUP_RANK", "0") == "0",
        uses_gloo=device_type == "cpu",
    )


def judge_places(places: Sequence[Place]) -> Finding:
    wrong: dict[tuple[str, str, str], list[int]] = {}
    for rank, one in enumerate(places):
        for reason in _wrong(one):
            wrong.setdefault(reason, []).append(rank)
    if wrong:
        several = len(places) > 1
        said = "; ".join(f"{why} ({ranks(of)})" if several else why for (_, why, _), of in wrong.items())
        fixes = "; ".join(dict.fromkeys(fix for _, _, fix in wrong))
        return Finding("network", False, said, fixes, "; ".join(dict.fromkeys(value for value, _, _ in wrong)))
    hosts = sorted({one.host for one in places})
    named = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    used = sorted({one.gloo if one.uses_gloo else one.nccl for one in places} - {""})
    return Finding("network", True, f"{named}{f', interface {chr(44).join(used)}' if used else ''}")


def _wrong(one: Place) -> list[tuple[str, str, str]]:
    """(value, reason, fix) of each."""
    here = f"{one.host} has {', '.join(one.interfaces)}"
    found = [
        (f"{GLOO}={one.gloo}", f"there is no interface {name}: {here}", f"export {GLOO}=NAME of one of these")
        for name in filter(None, one.gloo.split(","))
        if name not in one.interfaces
    ]
    if one.nccl and not _admitted(one.nccl, one.interfaces):
        reason = f"no interface fits {one.nccl}: {here}"
        found.append((f"{NCCL}={one.nccl}", reason, f"export {NCCL}=NAME of one of these"))
    if not one.several_hosts:
        return found
    if one.uses_gloo and not one.gloo and (not one.addresses or any(map(_is_loopback, one.addresses))):
        at = f"resolves to {', '.join(one.addresses)}" if one.addresses else "does not resolve"
        reason = f"the name {one.host} {at}, where no other host reaches it"
        found.append((one.host, reason, f"export {GLOO}=NAME of the interface that joins the hosts (ip address)"))
    if not one.first_host and (not one.master_addresses or any(map(_is_loopback, one.master_addresses))):
        at = ", ".join(one.master_addresses) or "nothing"
        reason = f"MASTER_ADDR {one.master or '(not set)'} resolves to {at} on {one.host}"
        fix = "give torchrun --local-addr ADDRESS on every host, and --rdzv-conf is_host=1 on the first, is_host=0 else"
        found.append((one.master, reason, fix))
    return found


def _admitted(pattern: str, interfaces: Sequence[str]) -> list[str]:
    """NCCL's way: a list of prefixes, exact names after ``=``, or with ``^`` before it of those that are left out."""
    excluded, exact = pattern.startswith("^"), pattern.lstrip("^").startswith("=")
    names = [name for name in pattern.lstrip("^").lstrip("=").split(",") if name]
    fits = [one for one in interfaces if any(one == n if exact else one.startswith(n) for n in names)]
    return [one for one in interfaces if one not in fits] if excluded else fits


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _addresses(name: str) -> list[str]:
    """A look-up can hang for as long as a name server does not answer."""
    found: list[str] = []

    def look_up() -> None:
        try:
            found.extend(sorted({str(one[4][0]) for one in socket.getaddrinfo(name, None)}))
        except OSError:
            return

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(LOOK_UP_S)
    return list(found)

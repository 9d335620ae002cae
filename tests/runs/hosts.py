"""Two "hosts" on one machine: namespaces with a name, an address, a network and processes of their own, and a cable.

The cable is a pair of virtual interfaces. Cutting it drops every packet in both directions and tells nobody, as a
pulled switch port or a firewall does: no interface goes down, no connection is reset.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str:
    """Why there can be no such hosts here; "" when there can."""
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            return f"two hosts need {tool} (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "two hosts need root, for network namespaces"
    probe = f"bigtrain{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return f"no network namespace can be made here: {made.stderr.strip()}" if made.returncode else ""


@dataclass(frozen=True)
class Hosts:
    """Both hosts, by the names of their namespaces; the machine's names are `host0` and `host1`."""

    spaces: tuple[str, str]

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run on a host."""
        named = f'hostname host{host} && exec "$@"'
        return [
            "ip",
            "netns",
            "exec",
            self.spaces[host],
            "unshare",
            *("--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
            "sh",
            "-c",
            named,
            "sh",
            *command,
        ]

    def cut(self) -> None:
        """No packet passes from now on: a queue of one byte, which holds none."""
        for space in self.spaces:
            _ip(f"tc -n {space} qdisc add dev eth0 root tbf rate 8bit burst 1 limit 1")

    def mend(self) -> None:
        """Packets pass again."""
        for space in self.spaces:
            _ip(f"tc -n {space} qdisc del dev eth0 root")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """The hosts, with the cable whole; nothing of them is left afterwards."""
    hosts = Hosts((f"bigtrain{os.getpid()}-0", f"bigtrain{os.getpid()}-1"))
    files = [Path("/etc/netns") / space for space in hosts.spaces]  # `ip netns exec` binds them over /etc
    names = "127.0.0.1 localhost\n" + "".join(f"{ip} host{i}\n" for i, ip in enumerate(ADDRESSES))
    try:
        for space, folder in zip(hosts.spaces, files, strict=True):
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(names)
            _ip(f"ip netns add {space}")
        first, second = hosts.spaces
        _ip(f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}")
        for space, address in zip(hosts.spaces, ADDRESSES, strict=True):
            _ip(f"ip -n {space} addr add {address}/24 dev eth0")
            for interface in ("lo", "eth0"):
                _ip(f"ip -n {space} link set {interface} up")
        yield hosts
    finally:
        for space, folder in zip(hosts.spaces, files, strict=True):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


def _ip(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, text=True)

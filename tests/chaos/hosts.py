"""Hosts with addresses of their own, in network namespaces on one bridge, and links that can be cut."""

import contextlib
import os
import shutil
import subprocess
from typing import Any, Self

from tests.tools import WorkerProcess


def why_not() -> str:
    """Return what is missing for hosts; "" if nothing is. The kernel may still refuse a Network."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Host:
    """A host: its processes reach the network by one link, that of `address`."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._port = f"{name}p"  # the bridge's end of its link

    def connect(self, bridge: str) -> None:
        _ip("link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self._port, "master", bridge, "up")
        _ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", self.name, "link", "set", device, "up")

    def disconnect(self) -> None:
        """Remove the link. Deleting its namespace alone would remove it only some time later."""
        _ip("link", "delete", self._port)

    def cut(self) -> None:
        """Drop all packets in both directions, silently."""
        _ip("link", "set", self._port, "down")

    def mend(self) -> None:
        _ip("link", "set", self._port, "up")

    def worker(self, *arguments: str, url: str, **environment: str) -> WorkerProcess:
        within = ("ip", "netns", "exec", self.name)
        return WorkerProcess(*arguments, within=within, url=url, stdin=subprocess.DEVNULL, **environment)


class Network:
    """Two hosts on a bridge, for a `with`. This machine has `address` on the bridge."""

    def __init__(self) -> None:
        self._name = f"spark{os.getpid()}"
        self._subnet = f"198.18.{os.getpid() % 256}"  # of the range for tests of networks
        self.address = f"{self._subnet}.1"
        self.hosts = [Host(f"{self._name}{n}", f"{self._subnet}.{n}") for n in (2, 3)]
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            _ip("link", "add", self._name, "type", "bridge")
            stack.callback(_ip, "link", "delete", self._name)
            _ip("address", "add", f"{self.address}/24", "dev", self._name)
            _ip("link", "set", self._name, "up")
            for host in self.hosts:
                _ip("netns", "add", host.name)
                stack.callback(_ip, "netns", "delete", host.name)
                host.connect(self._name)
                stack.callback(host.disconnect)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.close()

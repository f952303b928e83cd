"""Reports the state of the service to systemd, by the datagrams of sd_notify(3)."""

import os
import socket


def notify(state: str) -> None:
    """Send `state`, such as READY=1, if systemd asked for it with Type=notify; else do nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(state.encode(), address)

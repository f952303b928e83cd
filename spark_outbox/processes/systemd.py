"""Reports the state of the service to systemd, by the datagrams of sd_notify(3)."""

import contextlib
import os
import socket
import time

LEEWAY = 15.0
"""Seconds for the end of the processes, after those for their handlers."""


def notify(state: str, *, patience: float = 1.0) -> None:
    """Send `state`, such as READY=1, if systemd asked for it with Type=notify; else do nothing.

    A service manager that is gone, or reads nothing for `patience` seconds, is no reason to stop.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
    ):
        channel.settimeout(patience)
        channel.sendto(state.encode(), address)


def stopping(seconds: float) -> None:
    """Say that the service stops within `seconds`, whatever the unit's TimeoutStopSec says."""
    notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={(seconds + LEEWAY) * 1e6:.0f}")


def reloading() -> None:
    """Say that the service loads new code; READY=1 ends that."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval() -> float | None:
    """Return the seconds within which systemd wants a WATCHDOG=1 of this process; None if it doesn't."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    if not usec.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 1e6

"""A handler that does what its event says, for tests with real worker processes."""

import asyncio
import ctypes
import json
import os
import socket
import time
from pathlib import Path

from django.db import connections

from spark_outbox import Event, handler
from tests.challenges.models import Handled


@handler(r"^probe_in_time$", timeout=0.2, name="in time")
@handler(r"^probe(?!_in_time|_crash|_detached|_async)")
def probe(event: Event) -> None:
    """Note the call in the ledger; then touch `started`, run `sql`, wait for `go`, or raise, as told."""
    Handled.objects.create(key=event.key, handler="probe", note=str(os.getpid()))
    if "started" in event:
        Path(event["started"]).write_text(str(os.getpid()))
    if "sql" in event:
        with connections["default"].cursor() as cursor:
            cursor.execute(event["sql"])
    if "go" in event:
        while not Path(event["go"]).exists():
            time.sleep(0.005)
    if "raise" in event:
        raise RuntimeError(event["raise"])


@handler(r"^probe_crash$", name="crash", max_attempts=2, backoff=0.1)
def crash(event: Event) -> None:
    Handled.objects.create(key=event.key, handler="crash")
    ctypes.string_at(0)


@handler(r"^probe_(detached|async)$", name="sibling")
def sibling(event: Event) -> None:
    Handled.objects.create(key=event.key, handler="sibling")


@handler(r"^probe_detached$", name="detached", atomic=False, timeout=600)
def detached(event: Event) -> None:
    """As `probe`, in no transaction; notes in the ledger that it came through."""
    Path(event["started"]).write_text(str(os.getpid()))
    while not Path(event["go"]).exists():
        time.sleep(0.005)
    Handled.objects.create(key=event.key, handler="after", note=str(os.getpid()))


@handler(r"^probe_async$", name="async")
async def concurrent(event: Event) -> None:
    Path(event["started"]).write_text(str(os.getpid()))
    while not Path(event["go"]).exists():
        await asyncio.sleep(0.005)
    await Handled.objects.acreate(key=event.key, handler="after", note=str(os.getpid()))


@handler(r"^probe_detached_crash$", name="detached crash", atomic=False, max_attempts=2, backoff=0.1)
def detached_crash(event: Event) -> None:
    ctypes.string_at(0)


@handler(r"^sockets$", name="sockets")
def sockets(event: Event) -> None:
    """Note what is set on the sockets of the worker's connections, by their aliases and sides."""
    options = {
        "keepalives": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        "keepalives_idle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        "keepalives_interval": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        "keepalives_count": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
        "tcp_user_timeout": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    }
    found = {}
    for connection in connections.all(initialized_only=True):
        with socket.socket(fileno=os.dup(connection.connection.fileno())) as end:
            client = {name: end.getsockopt(*each) for name, each in options.items()}
        with connection.cursor() as cursor:
            cursor.execute("select name, setting::int from pg_settings where name ~ '^tcp_(k|u)'")
            found[connection.alias] = {"client": client, "server": dict(cursor.fetchall())}
    Handled.objects.create(key=event.key, handler="sockets", note=json.dumps(found))

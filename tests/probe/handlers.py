"""Handlers that do what their event says, for tests with real worker processes."""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from django.contrib.auth.models import Group
from django.db import DatabaseError, connection, connections, transaction

from spark_outbox import BatchFailed, Discard, Event, Retry, emit, handler
from spark_outbox.worker import settle
from tests.challenges.models import Handled


@handler(r"^probe_in_time$", timeout=0.2, name="in time")
@handler(r"^probe(?!_in_time|_crash|_detached|_async|_kill|_exit)")
def probe(event: Event) -> None:
    """Note the call in the ledger; then touch `started`, run `sql`, emit the key `emits`, have something
    take `later` seconds after the commit, wait for `go`, or raise, as told."""
    Handled.objects.create(key=event.key, handler="probe", note=str(os.getpid()))
    if "started" in event:
        Path(event["started"]).write_text(str(os.getpid()))
    if "sql" in event:
        run_sql(event["sql"])
    if "emits" in event:
        emit("probe", event["emits"])
    if "later" in event:
        transaction.on_commit(partial(time.sleep, event["later"]))
    if "go" in event:
        while not Path(event["go"]).exists():
            time.sleep(0.005)
    if "raise" in event:
        raise RuntimeError(event["raise"])


@handler(r"^probe_crash$", name="crash", max_attempts=2, backoff=0.1)
def crash(event: Event) -> None:
    Handled.objects.create(key=event.key, handler="crash")
    ctypes.string_at(0)


@handler(r"^probe_kill_all_plain$", name="kill all", max_attempts=2, backoff=0.1)
@handler(
    r"^probe_kill_all_detached$", name="kill all, detached", max_attempts=2, backoff=0.1, atomic=False
)
def kill_all(event: Event) -> None:
    """Have the worker, its supervisor and all of its children killed, as by a container's limit."""
    with Path(event["calls"]).open("a") as calls:
        calls.write("!")
    os.killpg(0, signal.SIGKILL)


@handler(r"^probe_exit$", name="exit", backoff=3600)
def end_process(event: Event) -> None:
    """End the process as if it were done."""
    os._exit(0)


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
    for each in connections.all(initialized_only=True):
        with socket.socket(fileno=os.dup(each.connection.fileno())) as end:
            client = {name: end.getsockopt(*option) for name, option in options.items()}
        with each.cursor() as cursor:
            cursor.execute("select name, setting::int from pg_settings where name ~ '^tcp_(k|u)'")
            found[each.alias] = {"client": client, "server": dict(cursor.fetchall())}
    Handled.objects.create(key=event.key, handler="sockets", note=json.dumps(found))


@handler(r"^detached_sockets$", name="detached sockets", atomic=False)
def detached_sockets(event: Event) -> None:
    sockets(event)


# All ways to come to grief, each with what the event calls its secret in the message, or in a row.


def leak(secret: str) -> NoReturn:
    raise ValueError(secret)


def run_sql(sql: str, *params: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)


def chain(secret: str) -> None:
    try:
        leak(secret)
    except ValueError as error:
        raise RuntimeError from error


def break_unique(secret: str) -> None:
    for _ in range(2):
        Group.objects.create(name=secret)


def swallow(secret: str) -> None:
    with contextlib.suppress(DatabaseError):
        break_unique(secret)


def lose(secret: str) -> None:
    run_sql("rollback")
    leak(secret)


def close(secret: str) -> None:
    connection.close()
    leak(secret)


def discard(secret: str) -> None:
    raise Discard(secret)


def retry(secret: str) -> None:
    raise Retry(secret, after=0.1)


def leave(secret: str) -> None:
    raise SystemExit(secret)


def be_unspeakable(secret: str) -> None:
    class Unspeakable(Exception):
        __str__ = partial(leak, secret)

    raise Unspeakable


def write_what_the_commit_refuses(secret: str) -> None:
    Handled.objects.create(key="refused", handler="refused", note=secret)


def leave_for_later(secret: str) -> None:
    transaction.on_commit(partial(leak, secret))
    transaction.on_commit(lambda: leak(secret))


def succeed(secret: str) -> None:
    run_sql("select %s", secret)
    emit("probe", f"after {secret}")


WAYS: dict[str, tuple[Callable[[str], object], str]] = {
    "raise": (leak, "failed"),
    "chain": (chain, "failed"),
    "value": (partial(run_sql, "select %s::integer"), "failed"),
    "unique": (break_unique, "failed"),
    "swallow": (swallow, "failed"),
    "lose": (lose, "failed"),
    "close": (close, "failed"),
    "syntax": (partial(run_sql, "select 1 2 %s"), "failed"),
    "discard": (discard, "discarded"),
    "retry": (retry, "failed"),
    "exit": (leave, "failed"),
    "unspeakable": (be_unspeakable, "failed"),
    "commit": (write_what_the_commit_refuses, "failed"),
    "later": (leave_for_later, "done"),
    "crash": (lambda _: ctypes.string_at(0), "failed"),
    "end": (lambda _: os._exit(3), "failed"),
    "batch": (leak, "failed"),
    "async": (leak, "failed"),
    "detached": (leak, "failed"),
    "slow": (lambda _: time.sleep(60), "failed"),
    "succeed": (succeed, "done"),
}
"""By the end of the event's group, `leak_…`: what is done with the secret, and how the event ends."""


def register(way: str, act: Callable[[str], object]) -> None:
    options: dict[str, Any] = {"name": f"leak {way}", "max_attempts": 2, "backoff": 0.1}

    def one(event: Event) -> None:
        secret = event["secret"]
        act(secret)

    def many(events: list[Event]) -> None:
        raise BatchFailed({event: ValueError(event["secret"]) for event in events})

    async def concurrent(event: Event) -> None:
        one(event)

    functions: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "batch": (many, {"batch": 10}),
        "async": (concurrent, {}),
        "detached": (one, {"atomic": False}),
        "slow": (one, {"timeout": 0.2}),
    }
    function, more = functions.get(way, (one, {}))
    decorate: Callable[..., object] = handler(rf"^leak_{way}$", **options, **more)
    decorate(function)


for way, (act, _) in WAYS.items():
    register(way, act)


@handler(r"^sabotage$")
def sabotage(event: Event) -> None:
    """Put a bug into the worker."""
    settle.write = lambda *_, **__: leak(event["secret"])

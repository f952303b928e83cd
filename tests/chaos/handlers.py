"""Handlers of every kind, good and bad. Their effects are in the ledger, or in append-only files."""

import ctypes
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from django.db import connection
from django.db.models import F

from spark_outbox import Event, Retry, handler
from tests.chaos.models import Account, Effect
from tests.chaos.promised import AT_LEAST_ONCE, DOOMED, EXACTLY_ONCE, LATE

FILES = Path(os.environ.get("CHAOS_FILES", "."))

stubborn = partial(handler, max_attempts=1000, backoff=0.1, timeout=20)


def enter(name: str, event: Event) -> int:
    """Write into the ledger, in the worker's transaction; return the transaction's id."""
    return Effect.objects.create(
        key=event.key, handler=name, event_id=event.id, ordering_key=event.ordering_key
    ).transaction


def do_outside(name: str, event: Event, transaction: int = 0) -> None:
    """Have an effect that can't be rolled back: append one line, in one write."""
    line = f"{event.key} {event.id} {transaction} {time.time():.6f}\n"
    descriptor = os.open(FILES / f"{name}.effects", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@stubborn(EXACTLY_ONCE["ledger"], name="ledger")
def ledger(event: Event) -> None:
    if event.get("fails") and event.attempt <= event["fails"]:
        raise Retry("not yet", after=0.05)
    enter("ledger", event)


@stubborn(AT_LEAST_ONCE["outside"], name="outside")
def outside(event: Event) -> None:
    do_outside("outside", event, enter("outside", event))


@stubborn(AT_LEAST_ONCE["quiet"], name="quiet")
def quiet(event: Event) -> None:
    """Never touches the database."""
    do_outside("quiet", event)


@stubborn(EXACTLY_ONCE["flaky"], name="flaky")
def flaky(event: Event) -> None:
    enter("flaky", event)
    if event.attempt <= event["fails"]:
        raise OSError("a mail server is away")


@handler(f"^{DOOMED}$", name="doomed", max_attempts=2, timeout=20)
def doomed(event: Event) -> None:
    """Write in a way that Django does not see, then fail, each time.

    It fails with Retry, which opens no circuit. Otherwise the circuit would be open for minutes.
    """
    raw = connection.connection
    insert = "insert into chaos_effect (key, handler, event_id) values (%s, 'doomed', %s)"
    match event.id % 4:
        case 0:
            enter("doomed", event)
        case 1:
            raw.cursor().executemany(insert, [(event.key, event.id)] * 2)
        case 2:
            with raw.transaction():
                raw.execute(insert, (event.key, event.id))
        case 3:
            with raw.cursor().copy("copy chaos_effect (key, handler, event_id) from stdin") as copy:
                copy.write_row((event.key, "doomed", event.id))
    raise Retry("never", after=0.1)


LEFT_BEHIND = [
    "set local search_path = nowhere",
    "set local role chaos_tenant",
    "set local statement_timeout = 1",
    "set local chaos.tenant = '7'",
    "select set_config('chaos.tenant', '7', true)",
]
# Only with a session of its own: behind a transaction pooler these would leak to other clients.
if os.environ.get("CHAOS_LISTEN", "own") == "own":
    LEFT_BEHIND += [
        "set search_path = nowhere",
        "set role chaos_tenant",
        "set transaction read only",
        "set statement_timeout = 1",
        "select set_config('chaos.tenant', '7', false)",
    ]


@stubborn(EXACTLY_ONCE["untidy"], name="untidy")
def untidy(event: Event) -> None:
    """Succeed, and leave a setting changed. Note a setting that another call has left changed."""
    with connection.cursor() as cursor:
        cursor.execute(
            "select current_setting('search_path'), current_setting('role'),"
            " current_setting('transaction_read_only'),"
            " coalesce(current_setting('chaos.tenant', true), '')"
        )
        if cursor.fetchone() != ('"$user", public', "none", "off", ""):
            do_outside("leaked", event)
        enter("untidy", event)
        cursor.execute(LEFT_BEHIND[event.id % len(LEFT_BEHIND)])


# Not stubborn: of handler's two signatures, type checkers see the one without batch in a partial.
@handler(EXACTLY_ONCE["batch"], name="batch", batch=20, max_attempts=1000, backoff=0.1, timeout=20)
def batch(events: Sequence[Event]) -> None:
    for event in events:
        enter("batch", event)
    if len(events) > 1 and events[0].id % 7 == 0:
        raise OSError("a bulk request failed")


def move(event: Event, name: str, accounts: tuple[int, int], amount: int) -> None:
    for account in accounts:
        Account.objects.filter(pk=account).update(balance=F("balance") + amount)
        time.sleep(0.003)
    enter(name, event)


# Two groups: two batches take the same locks in opposite orders, so that they deadlock.
@stubborn(EXACTLY_ONCE["debit"], name="debit")
def debit(event: Event) -> None:
    move(event, "debit", (1, 2) if event.group.endswith("_up") else (2, 1), -1)


@stubborn(EXACTLY_ONCE["credit"], name="credit")
def credit(event: Event) -> None:
    move(event, "credit", (2, 1) if event.group.endswith("_up") else (1, 2), 1)


LEAK: list[bytearray] = []


@handler(EXACTLY_ONCE["rude"], name="rude", max_attempts=1000, backoff=0.1, timeout=0.3)
def rude(event: Event) -> None:
    """Harm the worker's process or connection at the first attempt, as no handler should."""
    enter("rude", event)
    if event.attempt > 1:
        return
    match event["vice"]:
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(3)
        case "spin":
            while True:
                pass
        case "leak":
            LEAK.append(bytearray(os.urandom(1) * 10_000_000))
        case "hang up":
            connection.close()
        case "terminate":
            connection.cursor().execute("select pg_terminate_backend(pg_backend_pid())")
        case "roll back":
            connection.connection.rollback()
        case "interrupt":
            raise KeyboardInterrupt


@stubborn(AT_LEAST_ONCE["async"], name="async")
async def concurrent(event: Event) -> None:
    do_outside("async", event)


if os.environ.get("CHAOS_LISTEN") != "poll":  # without lasting sessions, detached handlers are refused

    @stubborn(AT_LEAST_ONCE["detached"], name="detached", atomic=False)
    def detached(event: Event) -> None:
        time.sleep(0.02)
        do_outside("detached", event)


if os.environ.get("CHAOS_RELEASE") == "new":  # the old release has no handler for this group

    @stubborn(EXACTLY_ONCE["new"], name="new")
    def new(event: Event) -> None:
        enter("new", event)

    @stubborn(LATE["late"], name="late")  # nor this handler, for a group that it has
    def late(event: Event) -> None:
        enter("late", event)
        if event.attempt < 3:
            raise Retry("not yet", after=0.05)

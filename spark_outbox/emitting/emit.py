"""emit(): write events into the outbox, on the caller's connection and in the caller's transaction."""

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal, get_args

from django.db import router, transaction
from django.dispatch import Signal

from spark_outbox import conf
from spark_outbox.errors import DuplicateKey, IdCollision, InvalidEvent, NotInTransaction, NotMigrated
from spark_outbox.events.encoding import dump
from spark_outbox.events.event import Event
from spark_outbox.observing import hooks
from spark_outbox.registry.backoff import MAX_DELAY
from spark_outbox.store import emitting
from spark_outbox.store.emitting import NewRow

CHUNK_SIZE = 1000

OnDuplicate = Literal["ignore", "raise", "check"]
ON_DUPLICATE: tuple[str, ...] = get_args(OnDuplicate)

AnyEvent = Event | Mapping[str, Any]


def emit(
    group: str | AnyEvent,
    key: str | None = None,
    *,
    ordering_key: str | None = None,
    available_at: dt.datetime | None = None,
    delay: dt.timedelta | float | None = None,
    headers: Mapping[str, Any] | None = None,
    using: str | None = None,
    on_duplicate: OnDuplicate = "ignore",
    **payload: Any,
) -> Event | None:
    """Write one event in the current transaction; return it, or None if its key exists already.

    Instead of a group and options, give an Event, or a dict with the same names. Without a key, the
    event gets a time-ordered UUID. `delay` is seconds or a timedelta, counted by the database's clock;
    `available_at` is an aware datetime. `using` is a database alias; by default the router chooses.
    `on_duplicate` says what to do if the key exists: "ignore" the event; "raise" DuplicateKey; or
    "check": raise it only if the stored event has another group or payload.

    Waits for the end of any open transaction that has written the same key. A duplicate does not abort
    the transaction. Raises InvalidEvent, UnstorableValue or NotInTransaction before anything is written.
    Raises IdCollision if another event has the same id; the transaction is then rolled back.
    """
    if isinstance(group, str):
        event = Event(
            group,
            key,
            ordering_key=ordering_key,
            available_at=available_at,
            delay=delay,
            headers=headers,
            **payload,
        )
    elif not isinstance(group, Event | Mapping):
        raise InvalidEvent(
            f"Give a group (text), an Event or a dict, not {type(group).__name__}: {group!r:.100}."
        )
    else:
        options = (key, ordering_key, available_at, delay, headers)
        if payload or any(option is not None for option in options):
            raise InvalidEvent("Give an event, or a group and options, not both.")
        event = Event.of(group)
    alias = writable(using)
    if on_duplicate not in ON_DUPLICATE:
        raise InvalidEvent(f"on_duplicate is one of {', '.join(ON_DUPLICATE)}, not {on_duplicate!r}.")
    row = prepare(event)
    stored = _insert(row, alias)
    if stored is None:
        _meet_duplicate(row, on_duplicate, alias)
        return None
    event.is_stored_as(*stored)
    announce(alias)
    return event


def emit_many(events: Iterable[AnyEvent], using: str | None = None, chunk_size: int = CHUNK_SIZE) -> int:
    """Write any number of events, `chunk_size` in each statement; return how many were new.

    `events` is read as a stream; their ids follow its order. Each statement writes its rows in the order
    of their keys: two statements with the same keys wait for each other, and can't deadlock. Two
    transactions of several chunks still can, if their orders differ. Outside a transaction each chunk is
    committed by itself. Raises the errors of `emit`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, not {chunk_size}.")
    alias = writable(using)
    rows = (prepare(Event.of(event)) for event in events)
    return sum(write(chunk, using=alias) for chunk in chunks(rows, chunk_size))


def prepare(event: Event) -> NewRow:
    """Return the row that will hold `event`. Raises InvalidEvent or UnstorableValue."""
    delay = None if event.delay is None else _timedelta(event.delay)
    if event.available_at is not None:
        _check_time(event.available_at)
    return NewRow(
        event.key,
        event.group,
        dump(event.payload) if event.payload else "{}",
        dump(event.headers, root="headers") if event.headers else "{}",
        event.ordering_key,
        event.available_at,
        delay,
        event.key_is_generated,
    )


def write(rows: Sequence[NewRow], *, as_done: bool = False, using: str) -> int:
    """Write prepared rows in one statement, in the order given; return how many were new. With `as_done`
    nobody handles them, and nobody is told."""
    with _uncommittable_if_lost(using):
        if as_done:
            return len(emitting.insert_many(rows, as_done=True, using=using))
        new = _insert_many(rows, using)
    if new:
        announce(using)
    return len(new)


def _insert(row: NewRow, using: str) -> tuple[int, int] | None:
    """Write one event; return its id and its time in microseconds, or None if its key exists."""
    if not hooks.observes_emissions():
        stored = emitting.insert(row, using=using)
    else:
        with hooks.Emission([row], using).under_way() as emission:
            stored = emitting.insert(*_with_headers(emission, [row]), using=using)
            emission.new = [row] if stored else []
    if stored:
        hooks.emitted([row], using)
    return stored


def _insert_many(rows: Sequence[NewRow], using: str) -> list[int]:
    """Write events in one statement; return the places of the new ones, from 1."""
    if not hooks.observes_emissions():
        new = emitting.insert_many(rows, using=using)
    else:
        with hooks.Emission(rows, using).under_way() as emission:
            new = emitting.insert_many(_with_headers(emission, rows), using=using)
            emission.new = [rows[place - 1] for place in sorted(new)]
    hooks.emitted((rows[place - 1] for place in sorted(new)), using)
    return new


def _with_headers(emission: hooks.Emission, rows: Sequence[NewRow]) -> list[NewRow]:
    """Return the rows with the headers that were added."""
    texts = {own: emission.completed(own) for own in {row.headers for row in rows}}
    return [row._replace(headers=texts[row.headers]) for row in rows]


def _meet_duplicate(row: NewRow, on_duplicate: OnDuplicate, using: str) -> None:
    """Apply `on_duplicate` to a row that was not written; raise IdCollision if its key is not there."""
    if on_duplicate == "check" and emitting.is_same(row, using=using):
        return
    with _uncommittable_if_lost(using):
        emitting.check_key(row.key, using=using)
    if on_duplicate == "raise":
        raise DuplicateKey(f"There is an event with the key {row.key!r} already.")
    if on_duplicate == "check":
        raise DuplicateKey(
            f"The event with the key {row.key!r} has another group or payload. Give each event "
            "that must be handled separately a key of its own."
        )


@contextmanager
def _uncommittable_if_lost(using: str) -> Iterator[None]:
    """Make Django roll back the innermost atomic() after an IdCollision, as after a database error."""
    try:
        yield
    except IdCollision:
        if transaction.get_connection(using).in_atomic_block:
            transaction.set_rollback(True, using=using)
        raise


events_committed = Signal()
"""Sent, with `using`, after a transaction that emitted has committed, if DISPATCH is "on_commit"."""


def announce(using: str) -> None:
    """With DISPATCH = "on_commit", send `events_committed` once, after the commit."""
    if conf.current().DISPATCH != "on_commit":
        return
    hooks = transaction.get_connection(using).run_on_commit
    if not any(getattr(hook[1], "func", None) == events_committed.send for hook in hooks):
        send = partial(events_committed.send, sender=None, using=using)
        transaction.on_commit(send, using=using, robust=True)


def writable(using: str | None) -> str:
    from spark_outbox.models import OutboxEvent

    alias = using or router.db_for_write(OutboxEvent)
    connection = transaction.get_connection(alias)
    if connection.vendor != "postgresql":
        raise NotMigrated(
            f"Database {alias!r} is {connection.vendor}, and the outbox needs PostgreSQL: choose "
            "another database by using=… or a router's db_for_write()."
        )
    if conf.current().REQUIRE_ATOMIC and not connection.in_atomic_block:
        raise NotInTransaction(
            f"emit() was called outside a transaction on database {alias!r}, and "
            "SPARK_OUTBOX['REQUIRE_ATOMIC'] is set: put emit() and the change that it reports into one "
            "`with transaction.atomic():`."
        )
    return alias


def _timedelta(delay: dt.timedelta | float) -> dt.timedelta:
    try:
        delta = delay if isinstance(delay, dt.timedelta) else dt.timedelta(seconds=delay)
    except (TypeError, ValueError, OverflowError):
        raise InvalidEvent(f"The delay is seconds or a timedelta, not {delay!r}.") from None
    if abs(delta) > MAX_DELAY:
        raise InvalidEvent(f"The delay {delta} is more than {MAX_DELAY.days} days.")
    return delta


def _check_time(available_at: dt.datetime) -> None:
    if not isinstance(available_at, dt.datetime):
        raise InvalidEvent(f"available_at is a datetime, not {available_at!r}.")
    if conf.use_tz() and available_at.tzinfo is None:
        raise InvalidEvent(
            f"available_at {available_at} has no time zone. django.utils.timezone.make_aware() "
            "gives it one."
        )


def chunks(rows: Iterator[NewRow], size: int) -> Iterator[list[NewRow]]:
    while chunk := list(islice(rows, size)):
        yield chunk

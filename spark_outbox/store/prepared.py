"""Statements that are prepared in a worker's session, for events that come one by one.

For these, to plan a statement takes longer than to run it; and to bind it, and to wait for a BEGIN of
its own, as long as its way to the server and back.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from django.db import connections
from psycopg import Connection
from psycopg.errors import InvalidSqlStatementName
from psycopg.pq import TransactionStatus

from spark_outbox.store.connection import is_watched, rows_of, send

Result = TypeVar("Result")

_prepared: "WeakKeyDictionary[Connection[Any], dict[str, str]]" = WeakKeyDictionary()
"""How each statement was prepared in a session, by its name."""


def prepare(name: str, sql: str, *, types: str = "", using: str) -> None:
    """Prepare a statement, of parameters of these types, in a session that lasts; unless that has been
    done. It is sent as it is: the caller has addressed it."""
    raw = connections[using].connection
    statement = f"prepare {name}{types} as {sql}"
    there = _prepared.setdefault(raw, {})
    if there.get(name) != statement:
        there[name] = statement
        with connections[using].wrap_database_errors:
            _prepare(name, statement, raw)


def can_begin(name: str, *, using: str) -> bool:
    """Return whether a transaction can begin with this statement, past Django and psycopg.

    Not if somebody watches what Django sends, or psycopg is to begin transactions in another way.
    """
    raw = connections[using].connection
    return (
        name in _prepared.get(raw, ())
        and raw.pgconn.transaction_status == TransactionStatus.IDLE
        and not is_watched(using)
        and raw.isolation_level is raw.read_only is raw.deferrable is None
    )


def begin_with(name: str, arguments: str, *, first: str, using: str) -> list[tuple[Any, ...]]:
    """Run what comes `first`, if anything does, begin a transaction, and execute a prepared statement;
    all in one round trip. Return its rows."""
    raw = connections[using].connection
    sql = "; ".join(filter(None, [first, "begin", f"execute {name}{arguments}"]))
    with connections[using].wrap_database_errors:
        return rows_of(insist(lambda: send(sql, raw), raw), raw)


def insist(run: Callable[[], Result], raw: Connection[Any], *, undo: str = "") -> Result:
    """Send what executes prepared statements, in no transaction of its caller's.

    If they are gone, roll back, `undo` what a rollback does not, prepare them, and send it again: a
    handler, or psycopg, has deallocated all that it could find.
    """
    try:
        return run()
    except InvalidSqlStatementName:
        raw.rollback()
        if undo:
            send(undo, raw)
        _prepare_again(raw)
        return run()


def _prepare_again(raw: Connection[Any]) -> None:
    for name, statement in _prepared[raw].items():
        _prepare(name, statement, raw)


def _prepare(name: str, statement: str, raw: Connection[Any]) -> None:
    with suppress(InvalidSqlStatementName):
        send(f"deallocate {name}", raw)
    send(statement, raw)

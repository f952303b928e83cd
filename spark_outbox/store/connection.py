"""Which outbox a statement means, and how it runs on a Django connection.

On a worker's connection it is the outbox that its search_path found first, by its schema, whatever a
handler makes of the search_path. Elsewhere it is the one that the caller's search_path finds.
"""

import re
import select
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import Connection
from psycopg.adapt import Transformer
from psycopg.errors import Diagnostic, error_from_result
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult

from spark_outbox.errors import NotMigrated

Using = str | BaseDatabaseWrapper

SCHEMA = """
select relnamespace::regnamespace::text from pg_class where oid = to_regclass('spark_outbox_event')
"""

_schemas: "WeakKeyDictionary[Connection[Any], str]" = WeakKeyDictionary()
_TABLE = re.compile(
    r"(?<![\w.])spark_outbox_"
    r"(?:event|delivery|session|pauses?|events|status|failures|workers|snapshots|health)\b"
)


def no_outbox(using: str) -> NotMigrated:
    elsewhere = "" if using == DEFAULT_DB_ALIAS else f" --database {using}"
    return NotMigrated(
        f"Database {using!r} has no outbox. Run: manage.py migrate spark_outbox{elsewhere}"
    )


def fix_schema(*, using: str) -> None:
    """Have statements on this connection mean the outbox that its search_path finds now.

    Raises NotMigrated if it finds none."""
    found = fetch(SCHEMA, using=using)
    if not found:
        raise no_outbox(using)
    ((schema,),) = found
    _schemas[connections[using].connection] = schema


@contextmanager
def fixed_schema(*, using: str) -> Iterator[None]:
    """Do what `fix_schema` does, for the block, unless it has been done."""
    connection = connections[using]
    connection.ensure_connection()
    raw = connection.connection
    if raw in _schemas:
        yield
        return
    fix_schema(using=using)
    try:
        yield
    finally:
        _schemas.pop(raw, None)


def addressed(sql: str, using: Using) -> str:
    """Return the statement with the outbox's schema in it, if that is fixed."""
    raw = _connection(using).connection
    schema = None if raw is None else _schemas.get(raw)
    return sql if schema is None else _qualified(sql, schema)


@lru_cache(maxsize=512)
def _qualified(sql: str, schema: str) -> str:
    return _TABLE.sub(lambda table: f"{schema}.{table[0]}", sql)


def _connection(using: Using) -> BaseDatabaseWrapper:
    return connections[using] if isinstance(using, str) else using


def execute(sql: str, params: Any = None, *, using: Using) -> int:
    """Run a statement; return how many rows it wrote."""
    with _connection(using).cursor() as cursor:
        cursor.execute(addressed(sql, using), params)
        return int(cursor.rowcount)


def fetch(sql: str, params: Any = None, *, using: Using) -> list[Any]:
    """Run a query; return its rows."""
    return fetch_here(addressed(sql, using), params, using=using)


def fetch_here(sql: str, params: Any = None, *, using: Using) -> list[Any]:
    """Do it in the outbox that the caller's search_path finds."""
    with _connection(using).cursor() as cursor:
        cursor.execute(sql, params)
        return list(cursor.fetchall())


def fetch_noticed(sql: str, params: Any = None, *, using: str) -> tuple[list[Any], list[str]]:
    """Run a query; return its rows, and what its functions say in NOTICEs."""
    notices: list[str] = []

    def note(notice: Diagnostic) -> None:
        notices.append(notice.message_primary or "")

    connections[using].ensure_connection()
    raw = connections[using].connection
    raw.add_notice_handler(note)
    try:
        return fetch(sql, params, using=using), notices
    finally:
        raw.remove_notice_handler(note)


def fetch_value(sql: str, params: Any = None, *, using: Using) -> Any:
    """Run a statement; return the first value of its first row."""
    return fetch(sql, params, using=using)[0][0]


def run_query(sql: str, *, using: str) -> None:
    """Run a query whose rows nobody needs."""
    fetch(sql, using=using)


def as_columns(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Turn rows into the arrays that `unnest` turns into rows again."""
    return [list(column) for column in zip(*rows, strict=True)]


# Past Django's wrappers and psycopg's cursors, which take longer than a quick statement itself


def is_watched(using: str) -> bool:
    """Return whether somebody wants to see what goes through Django's wrappers."""
    connection = connections[using]
    return bool(connection.execute_wrappers or connection.queries_logged)


def past_wrappers(sql: str, using: Using) -> PGresult:
    """Run statements; return the result of the last."""
    connection = _connection(using)
    with connection.wrap_database_errors:
        return send(sql, connection.connection)


def send(sql: str, raw: Connection[Any]) -> PGresult:
    """Do the same on psycopg's connection, with psycopg's errors."""
    return _checked(raw.pgconn.exec_(sql.encode()), raw)


def send_several(sql: str, raw: Connection[Any]) -> list[PGresult]:
    """Run statements; return the results of all."""
    pgconn = raw.pgconn
    pgconn.send_query(sql.encode())
    while pgconn.flush():
        _wait(pgconn, select.POLLOUT)
    results: list[PGresult] = []
    while True:
        while pgconn.is_busy():
            _wait(pgconn, select.POLLIN)
            pgconn.consume_input()
        if (result := pgconn.get_result()) is None:  # that was the last
            return [_checked(result, raw) for result in results]
        results.append(result)


def _wait(pgconn: PGconn, event: int) -> None:
    poll = select.poll()  # select() takes no descriptor over 1023
    poll.register(pgconn.socket, event)
    poll.poll()


def _checked(result: PGresult, raw: Connection[Any]) -> PGresult:
    if result.status not in {ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK}:
        raise error_from_result(result, raw.info.encoding)
    return result


def rows_of(result: PGresult, raw: Connection[Any]) -> list[tuple[Any, ...]]:
    """Return the rows of a result, as a cursor would."""
    transformer = Transformer(raw)
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, tuple)

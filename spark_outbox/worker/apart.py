"""Run a handler outside of the worker's transaction, on the worker's connection or beside it.

Nothing that the handler leaves behind outlasts it: neither an open transaction nor a setting.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus

from spark_outbox import conf
from spark_outbox.errors import BrokenTransaction, describe
from spark_outbox.store import limiting
from spark_outbox.worker import wire
from spark_outbox.worker.session_settings import SOUND, SessionSettings

logger = logging.getLogger(__name__)

_AT_REST = {TransactionStatus.IDLE, TransactionStatus.UNKNOWN}


def call_each_apart(connection: BaseDatabaseWrapper, own: int) -> None:
    """Before the commit: have each on_commit callback run apart, but for the `own` first ones, which are
    the worker's.

    One that raises must not cost other events theirs. Django's `robust` would log its traceback, and in
    Django 5.2 stumbles over a partial.
    """
    hooks: list[Any] = connection.run_on_commit
    call = partial(_call_back, connection.alias)
    hooks[own:] = [(sids, partial(call, callback), False) for sids, callback, _ in hooks[own:]]


def _call_back(using: str, callback: Callable[[], object]) -> None:
    """Run what a handler has left for after the commit."""
    try:
        with apart(using, None):
            copy_context().run(callback)
    except Exception as error:  # noqa: BLE001, logged
        function = getattr(callback, "func", callback)  # a partial's arguments are not for the log
        context = {
            "callback": getattr(function, "__qualname__", type(function).__qualname__),
            "error": describe(error),
        }
        logger.error(
            "%(callback)s, which a handler gave to on_commit(), failed (%(error)s).",
            context,
            extra=context,
        )


@contextmanager
def apart(using: str, limit: float | None) -> Iterator[None]:
    """Around a handler that runs on the worker's connection, but not in its transaction.

    None of its queries may take longer than `limit` seconds, unless a pooler lends the connection's
    session to others, too. Raises BrokenTransaction if it leaves a transaction open; then that is
    rolled back, and the connection closed.
    """
    connection = connections[using]
    blocks = len(connection.atomic_blocks)
    is_ours = connection.connection is not None and conf.current().direct(using) == using
    try:
        with _whole_session(connection, limit, blocks) if is_ours else nullcontext():
            yield
    finally:
        problem = _left_open(connection, blocks)
    if problem:
        raise BrokenTransaction(problem)


@contextmanager
def _whole_session(connection: BaseDatabaseWrapper, limit: float | None, blocks: int) -> Iterator[None]:
    """Limit the time of queries from the first one on; put back the settings that are changed."""
    raw, using = connection.connection, connection.alias
    settings = SessionSettings(using)
    milliseconds = settings.limit(limit)
    is_limited = has_changed = False

    def before(generator: Any) -> None:
        nonlocal is_limited, has_changed
        if not is_limited and milliseconds != settings.own_limit:
            is_limited = True
            limiting.limit_session(milliseconds, using=using)
        has_changed = settings.look(*wire.sent(generator, raw)) or has_changed

    try:
        with wire.watched(raw, before, lambda: None):
            yield
    finally:
        if connection.connection is raw and raw.pgconn.transaction_status in SOUND:
            if has_changed:
                settings.put_back(in_transaction=blocks > 0)
            elif is_limited:
                limiting.limit_session(settings.limits.session, using=using)


def _left_open(connection: BaseDatabaseWrapper, blocks: int) -> str:
    """Say what a handler that had no transaction of ours has left open, and close the connection."""
    raw = connection.connection
    if len(connection.atomic_blocks) > blocks:
        problem = "The handler left an atomic() block open."
    elif not blocks and (connection.in_atomic_block or not connection.get_autocommit()):
        problem = "The handler left autocommit off."
    elif raw is not None and raw.pgconn.pipeline_status:
        problem = "The handler left a pipeline() of psycopg open."
    elif not blocks and raw is not None and raw.info.transaction_status not in _AT_REST:
        problem = "The handler left a transaction open."
    else:
        return ""
    if raw is not None:
        raw.close()
    del connection.atomic_blocks[blocks:]
    if not blocks:
        connection.in_atomic_block = connection.needs_rollback = False
        connection.savepoint_ids.clear()
        connection.run_on_commit.clear()
        connection.close()
    return problem

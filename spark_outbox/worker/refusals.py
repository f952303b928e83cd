"""Tell a refusal from an outage, and find the event that is at fault.

A *refusal*: PostgreSQL answers, and says no. The transaction is rolled back, and its events are handled
again, one by one; an event that is refused alone fails. An *outage*: PostgreSQL is away, or out of
something that it needs for every statement. The worker reconnects and goes on, and no event is at fault,
unless the connection is lost each time that this event is being handled.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from django.db import Error, InterfaceError, OperationalError, connections

from spark_outbox.errors import NotSettled

T = TypeVar("T")

OUTAGES = ("08", "53", "57P", "58")
"""SQLSTATE of outages: connections, resources such as disk space, shutdown, system errors."""

UNDEFINED = ("42P01", "42703", "42883")
"""SQLSTATE of tables, columns and functions that are not there: if our own statement names them, and no
trigger, the outbox is just being migrated or restored."""

PASSING = ("40", "55P03", "57014")
"""SQLSTATE of refusals that may pass: serialization and deadlock, lock_timeout, a cancelled query."""

PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds to wait before what was refused, but may pass, is tried again."""

TIMES = 3
"""How often in a row an event is there when something fails that need not be its fault, until it is."""


class Refused(Exception):
    """PostgreSQL answers, and refuses what was to be written; `error` says why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error

    @property
    def may_pass(self) -> bool:
        """It may be nobody's fault."""
        return _state(self.error).startswith(PASSING)


@contextmanager
def refusals(*, using: str) -> Iterator[None]:
    """Raise Refused if PostgreSQL refuses what the block does on connection `using`.

    Put it around the transaction. The errors of an outage pass through.
    """
    connection = connections[using]
    connection.ensure_connection()
    raw = connection.connection  # Django may have another by the time that the transaction has ended
    try:
        yield
    except (Error, NotSettled) as error:
        if raw.closed or _is_outage(error):
            raise
        raise Refused(error) from error


def persevere(write: Callable[[], T], *, using: str) -> T:
    """Call `write`, which is a transaction, again while it is refused for what may pass.

    Returns what it does. Raises Refused for anything else, and if it does not pass.
    """
    for pause in PAUSES:
        try:
            with refusals(using=using):
                return write()
        except Refused as refused:
            if not refused.may_pass:
                raise
        time.sleep(pause)
    with refusals(using=using):
        return write()


class Suspects:
    """Counts, for one worker, how often in a row each event was there when something failed."""

    def __init__(self) -> None:
        self._times: Counter[int] = Counter()
        self._convicted: set[int] = set()

    def is_at_fault(self, event_id: int) -> bool:
        """Count once more; return whether it is the event's fault by now. Once it was, it is at once."""
        self._times[event_id] += 1
        if self._times[event_id] >= TIMES:
            self._convicted.add(event_id)
        return event_id in self._convicted

    def clear(self, event_ids: Iterable[int]) -> None:
        """These events went well."""
        for event_id in event_ids:
            self._times.pop(event_id, None)
            self._convicted.discard(event_id)

    def __bool__(self) -> bool:
        return bool(self._times)


def is_final(error: BaseException) -> bool:
    """Return whether PostgreSQL has answered, and would say no again."""
    state = _state(error)
    return bool(state) and not state.startswith((*OUTAGES, *PASSING))


def _is_outage(error: BaseException) -> bool:
    state = _state(error)
    if not state:  # it is no answer of the server's: another connection could not be made, say
        return isinstance(error, OperationalError | InterfaceError)
    if state in UNDEFINED:
        return not _diagnostic(error).context
    return state.startswith(OUTAGES)


def _diagnostic(error: BaseException) -> Any:
    cause: Any = error.__cause__ or error
    return cause.diag


def _state(error: BaseException) -> str:
    return getattr(error.__cause__ or error, "sqlstate", None) or ""

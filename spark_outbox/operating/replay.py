"""Replays past events to a handler: as new deliveries, or in a rehearsal that is rolled back."""

import re
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db import connections, transaction

from spark_outbox.events.event import Event
from spark_outbox.events.references import References
from spark_outbox.registry.handlers import Handler, Kind
from spark_outbox.store import limiting, reading, replaying
from spark_outbox.worker.isolation import Isolation, TransactionLost

CHUNK_SIZE = 1000

MOST_STATEMENTS = 100
"""How many of the statements of a rehearsal are kept."""

NOT_DONE = {
    "pending": "it is pending: its handlers are still to be called.",
    "running": "it is running: a handler is at work on it.",
    "failed": "it has failed, and is not done. To try it again, make it pending.",
    "unhandled": "no handler has matched it, so it is not done. A worker that has one will handle it.",
    "discarded": "it was discarded, and is not done. To handle it, make it pending.",
    "pruned": "it was pruned: of its payload nothing is left.",
}
"""The reason why an event is not replayed, by its status."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Selects the done events that match the handler and all other conditions."""

    handler: Handler
    group: str = ""
    since: datetime | None = None
    keys: tuple[str, ...] = ()

    def ids(self, *, using: str) -> Iterator[list[int]]:
        """Yield the ids of the selected events, a chunk of the table at a time, in order."""
        last = reading.LOWEST_ID
        keys = list(self.keys) or None
        while page := replaying.done_events(
            last, since=self.since, keys=keys, limit=CHUNK_SIZE, using=using
        ):
            last = page[-1][0]
            yield [event_id for event_id, group in page if self.matches(group)]

    def left_out(self, *, using: str) -> dict[str, str]:
        """Return the `keys` that are not selected, each with the reason."""
        found = replaying.states_of_keys(list(self.keys), using=using) if self.keys else {}
        reasons = {}
        for key in self.keys:
            if key not in found:
                reasons[key] = "there is no such event."
                continue
            group, status, created_at = found[key]
            if not self.matches(group):
                reasons[key] = f"its group {group!r} is not one of {self.groups()}."
            elif status != "done":
                reasons[key] = NOT_DONE[status]
            elif self.since is not None and created_at < self.since:
                reasons[key] = f"it was emitted at {created_at.isoformat(timespec='seconds')}."
        return reasons

    def groups(self) -> str:
        """Describe the conditions on groups for a message."""
        handled = f"the handler's, {self.handler.pattern.pattern!r}"
        return f"{handled}, and --group {self.group!r}" if self.group else handled

    def matches(self, group: str) -> bool:
        return bool(self.handler.pattern.search(group) and re.search(self.group, group))


def replay(selection: Selection, *, using: str) -> Iterator[int]:
    """Make each selected event pending for the handler; yield the total after each chunk.

    Other handlers are not called again. Each chunk is committed, and wakes the workers.
    """
    total = 0
    for ids in selection.ids(using=using):
        total += len(replay_ids(selection.handler, ids, using=using))
        yield total


def replay_ids(handler: Handler, ids: list[int], *, using: str) -> list[int]:
    """Make those of these events that are done pending for the handler; return their ids. The caller
    has looked that the handler is for their groups."""
    with transaction.atomic(using=using):
        locked = replaying.lock_done(ids, using=using)
        replaying.owe_again(locked, handler.name, using=using)
    return locked


def can_rehearse(*, using: str) -> bool:
    """Return whether this session may read what handlers are called with."""
    return replaying.can_read_documents(using=using)


@dataclass(slots=True)
class Rehearsal:
    """The result of a rehearsal."""

    events: int = 0
    queries: int = 0
    statements: list[str] = field(default_factory=list)
    """The first of them, up to MOST_STATEMENTS, without their parameters."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """The keys of events on which the handler failed, and the tracebacks."""
    rows: dict[str, int] = field(default_factory=dict)
    """Rows inserted, updated and deleted, by table."""


def rehearse(selection: Selection, *, using: str, limit: int) -> Rehearsal:
    """Call the handler with up to `limit` selected events, in one transaction that is rolled back.

    Effects outside of this database, such as mails, are real.
    """
    return _rehearse_all(selection.handler, selection.ids(using=using), limit, using)


def rehearse_ids(handler: Handler, ids: list[int], *, milliseconds: int, using: str) -> Rehearsal:
    """Do the same with these events, in whatever state they are; no query may take longer than that."""
    return _rehearse_all(handler, [ids], len(ids), using, milliseconds)


def _rehearse_all(
    handler: Handler, chunks: Iterable[list[int]], limit: int, using: str, milliseconds: int = 0
) -> Rehearsal:
    done = Rehearsal()
    with transaction.atomic(using=using):
        if milliseconds:
            limiting.limit_transaction(milliseconds, using=using)
        if handler.kind is Kind.DETACHED:
            # It may open durable transactions: let them nest in this one, as in a test.
            outermost: Any = connections[using].atomic_blocks[-1]
            outermost._from_testcase = True
        before = Counter(replaying.rows_written(using=using))
        try:
            for ids in chunks:
                _rehearse(handler, ids[: limit - done.events], done, using)
                if done.events >= limit:
                    break
            done.rows = dict((Counter(replaying.rows_written(using=using)) - before).most_common())
        except TransactionLost:
            pass  # it is among the failures; the rows that were written are unknown
        transaction.set_rollback(True, using=using)
    return done


def _rehearse(handler: Handler, ids: list[int], done: Rehearsal, using: str) -> None:
    """Call the handler with some events. Raises TransactionLost if a call ends the transaction."""
    references = References(using)
    events = Event.from_rows(reading.events_by_id(ids, using=using), references)
    isolation = Isolation(using, references, strict=True, apart=None)
    with connections[using].execute_wrapper(_counting(done)), isolation:
        for event in events:
            done.events += 1
            isolation.begin(handler.name)
            try:
                event.check()
                copy_context().run(handler.call, event if handler.batch is None else [event])
                isolation.end()
            except KeyboardInterrupt:  # somebody ends the command
                raise
            except BaseException:  # noqa: BLE001, whatever the handler raises is reported
                done.failures.append((event.key, traceback.format_exc()))
                isolation.undo()


def _counting(done: Rehearsal) -> Any:
    def count(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        done.queries += 1
        if len(done.statements) < MOST_STATEMENTS:
            done.statements.append(_text(sql))
        return execute(sql, params, many, context)

    return count


def _text(sql: Any) -> str:
    """Return a statement as text; psycopg may have composed it of parts."""
    return str(sql if isinstance(sql, str) else repr(sql))[:2000]

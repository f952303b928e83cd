"""Lists of events and deliveries, for those who turn pages; and how long their queries may take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.db import OperationalError, transaction
from psycopg.errors import QueryCanceled

from spark_outbox.store import limiting
from spark_outbox.store.listing import Found, Range, Wanted, deliveries, events
from spark_outbox.store.viewing import Row


class TookTooLong(Exception):
    """A query was given up: it has taken longer than it may."""


@contextmanager
def in_time(milliseconds: int, *, using: str) -> Iterator[None]:
    """Give no query of the block more time than that. The block must write nothing: it is rolled back,
    so that the limit ends with it. Raises TookTooLong."""
    try:
        with transaction.atomic(using=using):
            limiting.limit_transaction(milliseconds, using=using)
            yield
            transaction.set_rollback(True, using=using)
    except OperationalError as error:
        if not isinstance(error.__cause__, QueryCanceled):
            raise
        raise TookTooLong from error


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows, the latest first, and where the list goes on."""

    rows: list[Row]
    older: int | None
    """Go on before this id; None if there is no more."""
    newer: int | None
    """Go on after this id; None if there is no more."""
    looked_at: int
    is_cut: bool
    """Only a sample was looked at: there may be others."""


def page_of_events(wanted: Wanted, where: Range, *, size: int, using: str) -> Page:
    return _page(events, wanted, where, size, using)


def page_of_deliveries(wanted: Wanted, where: Range, *, size: int, using: str) -> Page:
    return _page(deliveries, wanted, where, size, using)


def _page(look: Callable[..., Found], wanted: Wanted, where: Range, size: int, using: str) -> Page:
    found = look(wanted, where, size=size, using=using)
    rows: list[dict[str, Any]] = found.rows
    has_more = len(rows) > size
    # If it has looked at as many ids as it may, it can look further.
    looks_on = not (has_more or found.is_sample or found.is_all)
    if where.after is None:
        rows = rows[:size]
        older = rows[-1]["id"] if has_more else found.lowest if looks_on else None
        newer = None
        if where.before is not None:
            newer = rows[0]["id"] if rows else where.before - 1
    else:
        rows = rows[-size:]
        newer = rows[0]["id"] if has_more else found.highest if looks_on else None
        older = rows[-1]["id"] if rows else where.after + 1
    return Page(rows, older, newer, found.looked_at, found.is_sample and not found.is_all)

"""Lists of events and deliveries, for those who turn pages; and how long their queries may take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from spark_outbox.store import listing
from spark_outbox.store.listing import Found, Range, Wanted
from spark_outbox.store.viewing import LOOKED_AT, Row


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows, the latest first, and where the list goes on."""

    rows: list[Row]
    older: int | None
    """Go on before this id; None if there is no more."""
    newer: int | None
    """Go on after this id; None if there is no more."""
    number: int | None
    """How many were found; None if they were not counted, as it is the list of all."""
    looked_at: int
    """Among how many they were found; 0 if these were all that there are."""


def events(wanted: Wanted, where: Range, *, size: int, using: str) -> Page:
    return _page(listing.events, wanted, where, size, using)


def deliveries(wanted: Wanted, where: Range, *, size: int, using: str) -> Page:
    return _page(listing.deliveries, wanted, where, size, using)


def ids_of_events(wanted: Wanted, *, using: str) -> list[int]:
    """Return the ids of all events that the list of these shows, on all its pages: up to LOOKED_AT. So a
    list without conditions has none."""
    if wanted == Wanted():
        return []
    found = events(wanted, Range(), size=LOOKED_AT, using=using)
    return [row["id"] for row in found.rows]


def _page(look: Callable[..., Found], wanted: Wanted, where: Range, size: int, using: str) -> Page:
    found = look(wanted, where, size=size, using=using)
    rows, has_more = found.rows, len(found.rows) > size
    older = newer = None
    if where.after is None:
        rows = rows[:size]
        if has_more:
            older = rows[-1]["id"]
        if where.before is not None:
            newer = rows[0]["id"] if rows else where.before - 1
    else:
        rows = rows[-size:]
        if has_more:
            newer = rows[0]["id"]
        older = rows[-1]["id"] if rows else where.after + 1
    return Page(rows, older, newer, found.number if found.is_sample else None, found.looked_at)


def with_key(wanted: Wanted, *, using: str) -> Wanted:
    """Return the same for the event of this key, or if there is none, for the keys that begin so. An
    asterisk at the end is not of the key then."""
    if not wanted.key or listing.has_key(wanted.key, using=using):
        return wanted
    return replace(wanted, key="", prefix=wanted.key.removesuffix("*"))


def groups(*, using: str) -> list[str]:
    """Return names of groups to choose from, not always all."""
    return listing.groups(using=using)


def estimate(table: str, *, using: str) -> int:
    """Return about how many rows a table has; less than 0 if the server does not know."""
    return listing.estimate(table, using=using)


def events_by_id(ids: Sequence[int], *, using: str) -> list[Row]:
    return listing.events_by_id(ids, using=using)


def delivery_by_id(delivery_id: int, *, using: str) -> Row | None:
    return listing.delivery_by_id(delivery_id, using=using)

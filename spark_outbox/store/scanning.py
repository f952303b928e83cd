"""Look for events that this worker can handle, a piece of the index at a time. Locks nothing.

The events of other groups, and those that wait for others of their ordering key, may be any number.
"""

import itertools
from typing import Any, NamedTuple

from spark_outbox.store.claiming import EARLIEST, Due
from spark_outbox.store.connection import fetch
from spark_outbox.store.filtering import IS_MINE
from spark_outbox.store.reading import LOWEST_ID


class Position(NamedTuple):
    """Where a piece ended: in the index of ready events, and in that of due ones."""

    id: int = LOWEST_ID
    due: Due = EARLIEST


class Piece(NamedTuple):
    """A bounded part of the index, read in its order. Locks nothing."""

    candidates: list[Any]
    """Ids of events that may be handled; or of ordered ones their keys, as often as they have events."""
    end: Position
    is_full: bool
    """It has ended before the index did."""
    oldest: int
    """The oldest transaction that had written and not ended yet."""
    next: int
    """The transaction that comes after all that had written by then."""


PIECE = 1000
"""How many entries of each index one look reads."""

READ_PIECE = """
with ready as materialized (
    select id, {what} as candidate, {mine} as is_mine from spark_outbox_event
    where status = 'pending' and available_at is null and {kind} and id > %(id)s
    order by id limit %(piece)s
),
due as materialized (
    select available_at, id, {what} as candidate, {mine} as is_mine from spark_outbox_event
    where status = 'pending' and {kind} and available_at <= statement_timestamp()
        and (available_at, id) > (%(time)s::timestamptz, %(due_id)s)
    order by available_at, id limit %(piece)s
)
select
    array(select candidate from ready where is_mine order by id),
    (select count(*) from ready), (select max(id) from ready),
    array(select candidate from due where is_mine order by available_at, id),
    (select count(*) from due), last.available_at::text, last.id,
    pg_snapshot_xmin(now.snapshot)::text::bigint, pg_snapshot_xmax(now.snapshot)::text::bigint
from (select pg_current_snapshot() as snapshot) as now
left join lateral (
    select available_at, id from due order by available_at desc, id desc limit 1
) as last on true
"""

# Each has an index of ready events and one of due ones.
UNORDERED = {"kind": "ordering_key is null", "what": "id"}
ORDERED = {"kind": "ordering_key is not null", "what": "ordering_key"}


def read_piece(after: Position, *, ordered: bool, groups: str | None, using: str) -> Piece:
    """Read what comes `after` a position, up to PIECE ready and PIECE due events."""
    params = {"id": after.id, "time": after.due.time, "due_id": after.due.id, "piece": PIECE}
    sql = piece_sql(ordered=ordered, groups=groups)
    (row,) = fetch(sql, {**params, "groups": groups}, using=using)
    ready, ready_count, last_id, due, due_count, last_time, last_due_id, oldest, following = row
    pairs = itertools.zip_longest(ready, due)
    return Piece(
        candidates=[each for pair in pairs for each in pair if each is not None],
        end=Position(
            after.id if last_id is None else last_id,
            after.due if last_time is None else Due(last_time, last_due_id),
        ),
        is_full=PIECE in (ready_count, due_count),
        oldest=oldest,
        next=following,
    )


def piece_sql(*, ordered: bool, groups: str | None) -> str:
    parts = ORDERED if ordered else UNORDERED
    return READ_PIECE.format(mine="true" if groups is None else IS_MINE, **parts)

"""The outlook of a worker that found nothing to claim: when to look again, and why."""

import math
from typing import NamedTuple

from spark_outbox.store.connection import fetch
from spark_outbox.store.filtering import IS_MINE
from spark_outbox.store.scanning import ORDERED, PIECE, UNORDERED


class Outlook(NamedTuple):
    """The reasons to look again, for a worker that found nothing to claim."""

    ready: bool
    """There are ready or due events, of any group: another transaction may hold their rows."""
    ordered: bool
    """The same of events with an ordering key, which may have to wait for others of it."""
    due_in: float
    """Seconds until the next delayed event; infinity if there is none. With groups it may be less."""
    running: bool
    """There are events that detached handlers are at work on, here or elsewhere; or seem to be."""
    unhandled: bool
    """There are events that some worker had no handler for."""
    oid: int
    """The table's."""


# The last ones are a min(), since for exists() a planner may choose to read the table to its end.
OUTLOOK = """
select
    exists (
        select from spark_outbox_event
        where status = 'pending' and available_at is null and ordering_key is null
    ) or exists (
        select from spark_outbox_event
        where status = 'pending' and available_at <= statement_timestamp() and ordering_key is null
    ),
    exists (
        select from spark_outbox_event
        where status = 'pending' and available_at is null and ordering_key is not null
    ) or exists (
        select from spark_outbox_event
        where status = 'pending' and available_at <= statement_timestamp() and ordering_key is not null
    ),
    extract(epoch from least({unordered}, {ordered}) - statement_timestamp())::float,
    exists (select from spark_outbox_delivery where status = 'running')
        or (select min(event_group) from spark_outbox_event where status = 'running') is not null,
    (select min(event_group) from spark_outbox_event where status = 'unhandled') is not null,
    'spark_outbox_event'::regclass::oid::integer
"""

NEXT_DUE = """(
    select nullif(min(available_at), 'infinity') from spark_outbox_event
    where status = 'pending' and {kind} and available_at > statement_timestamp()
)"""

# Among the next that are due; if none of them is ours, the last of them is when to look again.
NEXT_DUE_OF_GROUPS = f"""(
    select nullif(
        case
            when bool_or(is_mine) then min(available_at) filter (where is_mine)
            when count(*) = {PIECE} then max(available_at)
        end,
        'infinity'
    )
    from (
        select available_at, {IS_MINE} as is_mine from spark_outbox_event
        where status = 'pending' and {{kind}} and available_at > statement_timestamp()
        order by available_at, id limit {PIECE}
    ) as next
)"""


def outlook(*, groups: str | None, using: str) -> Outlook:
    ((ready, ordered, due_in, running, unhandled, oid),) = fetch(
        outlook_sql(groups=groups), {"groups": groups}, using=using
    )
    return Outlook(ready, ordered, math.inf if due_in is None else due_in, running, unhandled, oid)


def outlook_sql(*, groups: str | None) -> str:
    next_due = NEXT_DUE if groups is None else NEXT_DUE_OF_GROUPS
    unordered, ordered = (next_due.format(kind=parts["kind"]) for parts in (UNORDERED, ORDERED))
    return OUTLOOK.format(unordered=unordered, ordered=ordered)

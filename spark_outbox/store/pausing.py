"""Pauses: read them, put back what has waited for one that has ended, and change them by hand."""

import json
from typing import Any

from spark_outbox.store.connection import fetch, fetch_noticed

PAUSED = "select kind, name, spark_outbox_pause_mark(id) from spark_outbox_pause"

# Marks of pauses that have ended. From one handler to the next, and of each from one mark to the next:
# not through all deliveries, nor through all kinds of errors.
ENDED = """
with recursive failing (handler) as (
    select min(handler) from spark_outbox_delivery
    where status in ('pending', 'failed') and error <> ''
    union all
    select (
        select min(delivery.handler) from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and delivery.handler > failing.handler
    )
    from failing where failing.handler is not null
),
marked (handler, mark) as (
    select handler, 'spark_outbox: not called, it is paused (' from failing where handler is not null
    union all
    select marked.handler, (
        select min(spark_outbox_fingerprint(delivery.error)) from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and delivery.handler = marked.handler
            and spark_outbox_fingerprint(delivery.error) > marked.mark
    )
    from marked where starts_with(marked.mark, 'spark_outbox: not called, it is paused (')
)
select handler, mark from marked
where starts_with(mark, 'spark_outbox: not called, it is paused (') and mark like '%)'
    and mark not in (select spark_outbox_pause_mark(id) from spark_outbox_pause)
"""

# The events are due rather than ready: what they owe to other handlers has its own time. Not what a
# person has made due already. Each delivery loses its mark, and so is out of the way of the next look;
# also that of an event that somebody has ended by an UPDATE. Below the mark is the former error.
#
# By arrays of ids, and without the condition of the index of failures: or with old statistics PostgreSQL
# reads that index once for each event.
PUT_BACK = """
with locked as (
    select event.id from spark_outbox_delivery as delivery
    join spark_outbox_event as event on event.id = delivery.event_id
    where delivery.status in ('pending', 'failed') and delivery.error <> ''
        and delivery.handler = %(handler)s and spark_outbox_fingerprint(delivery.error) = %(mark)s
        and (
            delivery.available_at > statement_timestamp() or event.status not in ('pending', 'running')
        )
    limit %(limit)s
    for no key update of event skip locked
),
due as (
    update spark_outbox_delivery as delivery
    set available_at = statement_timestamp(), error = substr(delivery.error, length(%(mark)s) + 2)
    where delivery.event_id = any(array(select id from locked)) and delivery.handler = %(handler)s
        and delivery.status in ('pending', 'failed') and starts_with(delivery.error, %(mark)s)
    returning delivery.event_id
),
ready as (
    update spark_outbox_event as event set available_at = statement_timestamp()
    where event.id = any(array(select event_id from due)) and event.status = 'pending'
        and event.available_at > statement_timestamp()
)
select count(*) from due
"""

PAUSE = "select to_jsonb(pause)::text from spark_pause(%s, %s, %s) as pause"

RESUME = "select to_jsonb(pause)::text from spark_resume(%s, %s) as pause"

Changed = tuple[list[dict[str, Any]], list[str]]
"""The pauses that were changed, and what is to be said about it."""


def paused(*, using: str) -> dict[tuple[str, str], str]:
    """Return the mark of each pause, by its kind and name."""
    return {(kind, name): mark for kind, name, mark in fetch(PAUSED, using=using)}


def ended(*, using: str) -> list[tuple[str, str]]:
    """Return handlers and marks of deliveries whose pause has ended."""
    return fetch(ENDED, using=using)


def put_back(handler: str, mark: str, *, limit: int, using: str) -> int:
    """Make up to `limit` of these deliveries due, with their former error; but those whose event
    somebody holds. Return how many."""
    ((count,),) = fetch(PUT_BACK, {"handler": handler, "mark": mark, "limit": limit}, using=using)
    return int(count)


def pause(kind: str, name: str, why: str, *, using: str) -> Changed:
    return _changed(PAUSE, [kind, name, why], using)


def resume(kind: str, name: str, *, using: str) -> Changed:
    return _changed(RESUME, [kind, name], using)


def _changed(sql: str, params: Any, using: str) -> Changed:
    found, notices = fetch_noticed(sql, params, using=using)
    return [json.loads(text) for (text,) in found], notices

"""Samples of events and of deliveries: the ends of indexes, up to a number of rows.

Each is a query without its parameters, for a part of another. Its rows say whether the index goes on
after what was read of it (`is_cut`). A row may be in it twice.
"""

from spark_outbox.models import EventStatus
from spark_outbox.store import stepping
from spark_outbox.store.stepping import FAILS


def piece(source: str, most: int | str, *, more: str = "true") -> str:
    return (
        f"(select *, row_number() over () >= {most} and {more} as is_cut from ({source} limit {most}) "
        "as piece)"
    )


EVENT = """
    id, key, event_group, status, attempts, available_at, ordering_key, created_at, finished_at,
    is_pruned, last_error
"""

EVENTS = f"select {EVENT} from spark_outbox_events"

IN_STATE = {state: f"status = '{state}' and not is_pruned" for state in EventStatus.values}

_SHARE = """
named as materialized (select * from {kinds} limit 1000),
share (size) as (select greatest(10, {most} / greatest(count(*), 1)) from named)
"""

_SIZE = "(select size from share)"


def of_state(state: str, group: str, most: int) -> str:
    """Return a source of events that were put into this state last: the same share of each group."""
    if state == "pending":
        return " union all ".join(
            piece(
                f"{EVENTS} where status = 'pending' and available_at is {time} "
                f"and ordering_key is {order} order by {place} desc",
                most // 4,
            )
            for order in ("null", "not null")
            for time, place in (("null", "id"), ("not null", "available_at"))
        )
    in_state = f"{EVENTS} where {IN_STATE[state]} and event_group"
    if group:
        return piece(f"{in_state} = %(group)s order by finished_at desc", most)
    of_each = piece(f"{in_state} = named.event_group order by finished_at desc", _SIZE)
    stored = stepping.groups("stored", IN_STATE[state])
    return f"""(
        with recursive {stored}, {_SHARE.format(kinds="stored", most=most)}
        select latest.* from named cross join lateral {of_each} as latest
    )"""


# In the order of a language, other keys stand among those of a prefix. The key gives its collation.
_IN_ORDER_OF_LANGUAGE = "left(key, 0) || 'B' > 'a'"


def with_prefix(most: int) -> str:
    """Return a source of the events whose keys come first from the prefix on, and of the latest: there
    may be more of them than are read."""
    by_key = f"{EVENTS} where key >= %(prefix)s order by key"
    latest = piece(f"{EVENTS} order by id desc", most // 2, more="false")
    more = f"(starts_with(key, %(prefix)s) or {_IN_ORDER_OF_LANGUAGE})"
    return f"{piece(by_key, most // 2, more=more)} union all {latest}"


DELIVERY = "id, event_id, handler, status, attempts, available_at, attempted_at, duration, worker, error"

DELIVERIES = f"select {DELIVERY} from spark_outbox_delivery as delivery"


OF_KIND = f"{FAILS} and spark_outbox_fingerprint(delivery.error) = %(fingerprint)s::text"


def of_kind(handler: str, most: int) -> str:
    """Return a source of deliveries that failed last with this fingerprint: the same share of each
    handler."""
    if handler:
        of_it = f"{DELIVERIES} where {OF_KIND} and delivery.handler = %(handler)s"
        return piece(f"{of_it} order by attempted_at desc", most)
    of_each = piece(
        f"{DELIVERIES} where {OF_KIND} and delivery.handler = named.handler order by attempted_at desc",
        _SIZE,
    )
    return f"""(
        with recursive {stepping.FAILING_HANDLERS}, {_SHARE.format(kinds="failing", most=most)}
        select latest.* from named cross join lateral {of_each} as latest
    )"""


def failing(handler: str, most: int) -> str:
    """Return a source of deliveries that failed last: the same share of each kind of failure."""
    of_handler = f"{FAILS} and delivery.handler = %(handler)s" if handler else FAILS
    of_each = piece(
        f"""{DELIVERIES}
        where {FAILS} and delivery.handler = named.handler
            and spark_outbox_fingerprint(delivery.error) = named.fingerprint
        order by attempted_at desc""",
        _SIZE,
    )
    return f"""(
        with recursive {stepping.kinds(of_handler)}, {_SHARE.format(kinds="kind", most=most)}
        select latest.* from named cross join lateral {of_each} as latest
    )"""


def running(most: int) -> str:
    return piece(f"{DELIVERIES} where status = 'running'", most)

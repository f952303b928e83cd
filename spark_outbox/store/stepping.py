"""Step through an index from one name to the next: a row is read for each name, not all that have it."""

DELIVERIES = "spark_outbox_delivery as delivery"

FAILS = "delivery.status in ('pending', 'failed') and delivery.error <> ''"
"""The condition of the index of failures."""


def each(name: str, columns: str, values: str, source: str, condition: str) -> str:
    """Return a recursive WITH query: what `values` there are in `source` where the condition is true, as
    `columns`, in their order. An index must have these values under that condition."""
    last = ", ".join(f"{name}.{column}" for column in columns.split(", "))
    return f"""
{name} ({columns}) as (
    (select {values} from {source} where {condition} order by {values} limit 1)
    union all
    select following.* from {name} cross join lateral (
        select {values} from {source} where {condition} and ({values}) > ({last})
        order by {values} limit 1
    ) as following
)
"""


def groups(name: str, condition: str) -> str:
    """Return one for the groups of events."""
    return each(name, "event_group", "event.event_group", "spark_outbox_events as event", condition)


DONE_GROUPS = groups("done_group", "event.status = 'done' and not event.is_pruned")

FAILING_HANDLERS = each("failing", "handler", "delivery.handler", DELIVERIES, FAILS)


def kinds(condition: str) -> str:
    """Return one for the handlers and fingerprints of failures."""
    values = "delivery.handler, spark_outbox_fingerprint(delivery.error)"
    return each("kind", "handler, fingerprint", values, DELIVERIES, condition)

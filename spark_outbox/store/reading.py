"""Read events: the columns of an event, how they are mapped, and events by id."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from spark_outbox.errors import UnreadablePayload
from spark_outbox.events.decoding import MAX_STORED
from spark_outbox.events.event import StoredRow
from spark_outbox.store.connection import fetch

# Whatever SQL has put into a row, it can be claimed. Times are within the years that Python knows;
# created_at in microseconds, since a datetime costs more to load than all the other columns, and few
# ask for it. Large documents are NULL here, so that a batch of them does not fill the memory: the
# stored size, compressed, costs nothing to know.
EVENT_COLUMNS = """
    id, key, event_group,
    case when pg_column_size(payload) < 8192 then payload::text end,
    case when pg_column_size(headers) < 8192 then headers::text end,
    ordering_key, attempts,
    (extract(epoch from least(greatest(created_at, '0001-01-02'), '9999-12-30')) * 1000000)::bigint,
    case when available_at is not null then least(greatest(available_at, '0001-01-02'), '9999-12-30') end
"""

EVERY_OTHER = "*"
"""In a delivery, all handlers of its event that have no delivery of their own."""

HIGHEST_ID = 2**63 - 1
LOWEST_ID = -HIGHEST_ID
"""Of all but one: PostgreSQL takes the literal of the lowest bigint for no bigint."""

# The array has it uncompressed. As text even that may be too large for PostgreSQL itself.
LARGE_DOCUMENT = """
select size, case when size <= %(limit)s then document::text end
from (
    select {column} as document, pg_column_size(array[{column}]) as size
    from spark_outbox_event where id = %(id)s
) as stored
"""


def with_documents(rows: Iterable[Any], using: str) -> list[Any]:
    """Put a function that fetches it in the place of each large document."""
    return [
        row if row[3] is not None and row[4] is not None else _with_large(row, using) for row in rows
    ]


def select_events(sql: str, param: Any, using: str) -> list[StoredRow]:
    """Run a query of EVENT_COLUMNS that takes one parameter."""
    return list(map(StoredRow._make, with_documents(fetch(sql, [param], using=using), using)))


def _with_large(row: Sequence[Any], using: str) -> tuple[Any, ...]:
    event_id, key, group, payload, headers, *others = row
    if payload is None:
        payload = partial(_large_document, "payload", event_id, using)
    if headers is None:
        headers = partial(_large_document, "headers", event_id, using)
    return (event_id, key, group, payload, headers, *others)


def _large_document(column: str, event_id: int, using: str) -> str:
    params = {"limit": MAX_STORED, "id": event_id}
    found = fetch(LARGE_DOCUMENT.format(column=column), params, using=using)
    if not found:
        raise UnreadablePayload(f"The {column} can't be read any more: its event was deleted.")
    size, text = found[0]
    if text is None:
        raise UnreadablePayload(
            f"{size:,} bytes are too many for the {column}: no more than {MAX_STORED:,} are read."
        )
    return str(text)


EVENTS_BY_ID = f"""
select {EVENT_COLUMNS} from spark_outbox_event where id = any(%s) order by id
"""


def events_by_id(ids: list[int], *, using: str) -> list[StoredRow]:
    return select_events(EVENTS_BY_ID, ids, using)

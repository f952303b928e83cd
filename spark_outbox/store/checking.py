"""Questions of system checks, and of workers before they begin."""

from spark_outbox.store.connection import fetch_value

HAS_OUTBOX = "select to_regclass('spark_outbox_status') is not null"


def has_outbox(*, using: str) -> bool:
    """Return whether the migrations of spark_outbox have run in this database."""
    return bool(fetch_value(HAS_OUTBOX, using=using))


# For people. It never sets the sequence back. migrations/sql/0001_emitting.sql has the same text.
PUT_IDS_RIGHT = (
    "select setval('spark_outbox_event_id_seq', "
    "greatest(nextval('spark_outbox_event_id_seq'), max(id))) from spark_outbox_event;"
)
IDS_ARE_BEHIND = "select spark_outbox_ids_are_behind()"


def ids_are_behind(*, using: str) -> bool:
    """Return whether the sequence is yet to give out an id that an event has."""
    return bool(fetch_value(IDS_ARE_BEHIND, using=using))

"""Which events are a worker's own: those whose group matches its regular expression."""

from spark_outbox.store.connection import fetch

IS_MINE = "event_group ~ %(groups)s"


def with_groups(sql: str, groups: str | None) -> str:
    return sql.format(groups="" if groups is None else f"and {IS_MINE}")


CHECK_GROUPS = "select '' ~ %s"


def check_groups(pattern: str, *, using: str) -> None:
    """Raise DataError if `pattern` is no regular expression to PostgreSQL."""
    fetch(CHECK_GROUPS, [pattern], using=using)

"""A savepoint for each handler that touches the database, and the session settings to restore.

All of it runs past the wrappers and the log that watch the handlers' SQL.
"""

import json
from collections.abc import Mapping, Sequence

from psycopg.sql import quote

from spark_outbox.store.connection import past_wrappers

SAVEPOINT = "savepoint spark_outbox_{number}"
RELEASE = "release savepoint spark_outbox_{number}"
ROLLBACK_TO_SAVEPOINT = "rollback to savepoint spark_outbox_{number}"
NO_SUCH_SAVEPOINT = "3B001"
CHECK_CONSTRAINTS = "set constraints all immediate"

# Those of transactions end with their savepoints, and limits have statements of their own.
_NOT_KEPT = """
'statement_timeout', 'transaction_isolation', 'transaction_read_only', 'transaction_deferrable'
"""

SETTINGS = f"""
select
    (
        select json_object_agg(name, setting) from pg_settings
        where source = 'session' and name not in ({_NOT_KEPT})
    ),
    (
        select json_object_agg(name, current_setting(name, true))
        from json_array_elements_text({{names}}::json) as each (name)
    )
"""

# The user and the search_path come first: with those of a handler, the rest might not be allowed, or
# mean something else. A setting of the project's own that was not there comes back as '', as after
# PostgreSQL's SET LOCAL. In a pooler's session, what the worker has set for its transaction (`local`)
# ends with that.
RESTORE_SETTINGS = f"""
reset session authorization;
set search_path = pg_catalog;
select count(set_config(name, value, name = any({{local}}::text[])))
from (
    select name, coalesce(value, reset_val, '') as value
    from pg_settings left join json_each_text({{shown}}::json) as shown (name, value) using (name)
    where (source = 'session' or shown.name is not null)
        and setting is distinct from coalesce(value, reset_val) and name not in ({_NOT_KEPT})
    union all
    (
        select name, coalesce(value, '')
        from json_each_text({{named}}::json) as named (name, value)
        where current_setting(name, true) is distinct from value
        order by name = 'role'
    )
) as changed
"""


def savepoint(sql: str, *, using: str) -> None:
    """Run some of the statements above, or of `limiting`, as one query.

    Past psycopg's cursors, which take longer than the server does.
    """
    past_wrappers(sql, using)


def settings(names: Sequence[str], *, using: str) -> tuple[dict[str, str], dict[str, str | None]]:
    """Return the settings that were made in this session, and those of these names."""
    result = past_wrappers(SETTINGS.format(names=quote(json.dumps(names))), using)
    shown, named = (json.loads(result.get_value(0, column) or "{}") for column in (0, 1))
    return shown, named


def restore_settings(
    shown: Mapping[str, str],
    named: Mapping[str, str | None],
    *,
    first: str = "",
    local: Sequence[str] = (),
    limits: Sequence[str],
    using: str,
) -> None:
    """Run the statements `limits` and `first`, then restore what `settings` has returned, where it is
    different now. The limits go ahead, so that those of a handler do not end the rest."""
    sql = RESTORE_SETTINGS.format(
        shown=quote(json.dumps(shown, ensure_ascii=False)),
        named=quote(json.dumps(named, ensure_ascii=False)),
        local=quote(f"{{{','.join(local)}}}"),
    )
    past_wrappers("; ".join(filter(None, [*limits, first, sql])), using)

"""Watch what is sent to the server, whatever sends it: Django, psycopg's cursors of any kind, COPY.

Everything that psycopg sends passes through `Connection.wait`. Only libpq itself, `connection.pgconn`,
goes around it. This module reads the SQL and says what it may do; it never changes it.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from psycopg.sql import Composable

READS = 0
WRITES = 1
SAVEPOINT = 2
"""It starts a subtransaction."""
ANYTHING = 4
"""It may write to tables that it does not name."""
SETS = 8
"""It may change a setting of the session."""
DEFERS = 16
"""It changes when constraints are checked, until the transaction ends."""
ENDS = 32
"""It commits or rolls back the transaction."""
PIPELINE = 64
"""It starts psycopg's pipeline mode."""


@contextmanager
def watched(raw: Any, before: Callable[[Any], None], after: Callable[[], None]) -> Iterator[None]:
    """Call `before` with each generator that psycopg is about to run on the connection `raw`, and
    `after` once it has run. If `before` raises, nothing is sent."""
    outer = raw.__dict__.get("wait")
    wait = raw.wait

    def watch(generator: Any, *args: Any, **kwargs: Any) -> Any:
        before(generator)
        try:
            return wait(generator, *args, **kwargs)
        finally:
            after()

    raw.wait = watch
    try:
        yield
    finally:
        if outer is None:
            del raw.wait
        else:
            raw.wait = outer


def sent(generator: Any, raw: Any) -> tuple[int, str, Any]:
    """Return what a generator of psycopg is about to send: its kind, its SQL and its parameters."""
    frame = getattr(generator, "gi_frame", None)
    if frame is None:
        return READS, "", None
    arguments = frame.f_locals
    sql = arguments.get("query", arguments.get("statement"))
    if sql is None:
        return _WITHOUT_SQL.get(frame.f_code.co_qualname, READS), "", None
    text = as_text(sql, raw)
    return kind(text), text, arguments.get("params", arguments.get("params_seq"))


_WITHOUT_SQL = {
    "BaseConnection._commit_gen": ENDS,
    "BaseConnection._rollback_gen": ENDS,
    "BaseTransaction._enter_gen": WRITES | SAVEPOINT,
    "BaseTransaction._exit_gen": WRITES | ANYTHING,  # it may be rolled back
    "BasePipeline._enter_gen": PIPELINE,
}


def as_text(sql: Any, raw: Any) -> str:
    """Return any of the types of SQL that psycopg takes as a string."""
    if isinstance(sql, str):
        return sql
    if isinstance(sql, bytes):
        return sql.decode(errors="replace")
    return sql.as_string(raw) if isinstance(sql, Composable) else str(sql)


def kind(text: str) -> int:
    """Return what one or more statements may do, as a sum of the constants above."""
    if text.startswith(_PLAIN) and ";" not in text and "set_config" not in text:
        return READS if text[0] == "S" else WRITES
    found = SETS if _SET_CONFIG.search(text) else READS
    for statement in _CLUTTER.sub(" ", text).split(";"):
        if match := _VERB.match(statement):
            found |= _kind(match[1].lower(), match[2].lower())
    return found


_PLAIN = ("SELECT", "INSERT", "UPDATE", "DELETE")
_SET_CONFIG = re.compile(r"\bset_config\b", re.IGNORECASE)
_VERB = re.compile(r"[\s(]*(\w+)(.*)", re.DOTALL)

# Comments and literals, where semicolons and verbs mean nothing.
_CLUTTER = re.compile(
    r"""
      \b [eE] ' (?: [^'\\] | '' | \\. )* '
    | ' (?: [^'] | '' )* '
    | " (?: [^"] | "" )* "
    | (?<! [\w$] ) \$ ( \w* ) \$ .*? \$ \1 \$
    | -- [^\n]*
    | /\* .*? \*/
    | \b begin \s+ atomic \b .*? \b end \b
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)

_TO_SAVEPOINT = re.compile(r"\s+(?:(?:work|transaction)\s+)?to\b")

_KINDS = {
    "select": READS,
    "show": READS,
    "fetch": READS,
    "savepoint": WRITES | SAVEPOINT,
    "set": SETS,
    "reset": SETS,
    "discard": SETS,
    "do": SETS | WRITES | ANYTHING,
    "call": SETS | WRITES | ANYTHING,
    "commit": ENDS,
    "end": ENDS,
    "abort": ENDS,
}


def _kind(verb: str, rest: str) -> int:
    if verb == "rollback":
        return WRITES | ANYTHING if _TO_SAVEPOINT.match(rest) else ENDS
    if verb == "prepare" and rest.split(maxsplit=1)[:1] == ["transaction"]:
        return ENDS
    if verb == "set" and rest.split(maxsplit=1)[:1] == ["constraints"]:
        return DEFERS
    return _KINDS.get(verb, WRITES)

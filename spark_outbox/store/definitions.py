"""The functions, views and triggers of the outbox: as the migrations define them, and in a database.

The text of the migrations says what there must be: nothing is listed here, and nothing is created to
compare with. PostgreSQL keeps the body of a function as it was written, but a view only parsed: of views
the columns are compared.
"""

import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from django.db import ProgrammingError, connections, transaction
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder

from spark_outbox.migrations._postgresql import RunSQL
from spark_outbox.store import waking
from spark_outbox.store.connection import fetch

APP = "spark_outbox"


class Definition(NamedTuple):
    kind: str
    """`function`, `view` or `trigger`."""
    name: str
    text: str
    """The body of a function, the query of a view; empty for a trigger."""
    path: Path
    """The file that it is in."""


class Difference(NamedTuple):
    definition: Definition
    is_absent: bool
    """The database has none of this name; else it has another."""


class Applied(NamedTuple):
    """The migrations that a database has run, compared with those of this code."""

    lacking: list[str]
    is_newer: bool
    """It has run others, which may have redefined anything."""


def applied(*, using: str) -> Applied:
    """Compare which migrations have run. A role that may not read it is told that all have."""
    try:
        with transaction.atomic(using):
            recorded = MigrationRecorder(connections[using]).applied_migrations()
    except ProgrammingError:
        return Applied([], False)
    there = {name for app, name in recorded if app == APP}
    known = [name for name, _ in _migrations()]
    return Applied([name for name in known if name not in there], bool(there.difference(known)))


def differences(*, using: str) -> list[Difference]:
    """Compare the database with the migrations; in the order in which these define things.

    The triggers that wake workers are left out: their mode is a setting, see waking.
    """
    defined: dict[tuple[str, str], Definition] = {}
    for _, files in _migrations():
        for path in files:
            _define(path, defined)
    for statement in _statements(waking.SET_WAKE_MODE["gated"]):
        if head := _HEAD.match(statement):
            defined.pop((head["kind"], head["name"]), None)
    found: dict[tuple[str, str], list[str]] = {}
    for kind, name, text in fetch(FOUND, [[name for _, name in defined]] * 3, using=using):
        found.setdefault((kind, name), []).append(text)
    wanted: dict[tuple[str, str], str | None] = {
        key: definition.text for key, definition in defined.items()
    }
    wanted |= _columns([each for each in defined.values() if each.kind == "view"], using=using)
    return [
        Difference(definition, key not in found)
        for key, definition in defined.items()
        if key not in found or (wanted[key] is not None and wanted[key] not in found[key])
    ]


# The text of the migrations

_TOKEN = re.compile(r"--[^\n]*|'[^']*'|\"[^\"]*\"|(?P<tag>\$\w*\$).*?(?P=tag)|;", re.DOTALL)
_HEAD = re.compile(
    r"(?:\s|--[^\n]*\n)*(?P<verb>create|drop)\s+(?:or\s+replace\s+)?"
    r"(?P<kind>function|view|trigger)\s+(?:if\s+exists\s+)?(?P<name>\w+)"
)
_TEXT = {
    "function": re.compile(r"\bas\s+(?P<tag>\$\w*\$)(?P<text>.*)(?P=tag)", re.DOTALL),
    "view": re.compile(r"\bas\s(?P<text>.*)", re.DOTALL),
    "trigger": re.compile(r"(?P<text>)"),
}


def _migrations() -> Iterator[tuple[str, list[Path]]]:
    """Yield each migration's name, and the files of SQL that it runs."""
    package, _ = MigrationLoader.migrations_module(APP)
    if package is None:  # the project's tests run without migrations
        return
    for name in sorted(found.name for found in pkgutil.iter_modules(import_module(package).__path__)):
        if not name.startswith("_"):
            operations = import_module(f"{package}.{name}").Migration.operations
            yield name, [each.path for each in operations if isinstance(each, RunSQL) and each.path]


def _define(path: Path, defined: dict[tuple[str, str], Definition]) -> None:
    """Do to `defined` what the statements of a file do to a database."""
    for statement in _statements(path.read_text("utf-8")):
        if not (head := _HEAD.match(statement)):
            continue
        key = kind, name = head["kind"], head["name"]
        defined.pop(key, None)
        if head["verb"] == "create":
            text = _TEXT[kind].search(statement, head.end())
            defined[key] = Definition(kind, name, text["text"] if text else "", path)


def _statements(sql: str) -> Iterator[str]:
    start = 0
    for token in _TOKEN.finditer(f"{sql};"):
        if token[0] == ";":
            yield sql[start : token.start()]
            start = token.end()


# The database

FOUND = """
with home as (select relnamespace as oid from pg_class where oid = to_regclass('spark_outbox_event'))
select 'function', proname::text, prosrc from pg_proc
where pronamespace = (select oid from home) and proname::text = any(%s)
union all
select 'view', relname::text, (
    select string_agg(attname, ' ' order by attnum) from pg_attribute where attrelid = oid and attnum > 0
)
from pg_class as relation
where relkind = 'v' and relnamespace = (select oid from home) and relname::text = any(%s)
union all
select 'trigger', tgname::text, '' from pg_trigger join pg_class as relation on relation.oid = tgrelid
where tgenabled in ('O', 'A') and relnamespace = (select oid from home) and tgname::text = any(%s)
"""

# All in one statement, which reads no row. A column before those of each view has its name.
COLUMNS = "select * from {queries} where false"
QUERY = '(select null as "{name}") as before_{name}, ({text}) as {name}'


def _columns(views: list[Definition], *, using: str) -> dict[tuple[str, str], str | None]:
    """Return the names of the columns that each view's query has; None if this role may not run one of
    the queries, or if one needs what is absent."""
    columns: dict[str, list[str]] = {view.name: [] for view in views}
    queries = ", ".join(QUERY.format(name=view.name, text=view.text) for view in views)
    try:
        with transaction.atomic(using), connections[using].cursor() as cursor:
            cursor.execute(COLUMNS.format(queries=queries))
            described = [column.name for column in cursor.description or ()]
    except ProgrammingError:
        return {("view", name): None for name in columns}
    current: list[str] = []
    for name in described:
        if name in columns:
            current = columns[name]
        else:
            current.append(name)
    return {("view", name): " ".join(names) for name, names in columns.items()}

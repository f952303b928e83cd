"""System checks: settings and databases that can't work, and code that does not fit what is stored."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from django.core import checks
from django.core.checks import CheckMessage, Error, Info, Tags, register
from django.db import connections, router

from spark_outbox import conf, operations
from spark_outbox.errors import SettingsError
from spark_outbox.operating import fitting
from spark_outbox.registry.handlers import registry
from spark_outbox.store import checking, definitions, waking
from spark_outbox.store.checking import Counted
from spark_outbox.worker import bounds, ported

PSYCOPG = (3, 2, 10)
"""The oldest version that will do, as in pyproject.toml."""

NAMED = 10
"""How many names one message gives."""

DEFINE_AGAIN = (
    "sed -E 's/^create (function|view|trigger)/create or replace \\1/; "
    "s/^create index/& if not exists/' {files} | python manage.py shell --command \"import sys; "
    "from django.db import connections; connections['{alias}'].cursor().execute(sys.stdin.read())\""
)
"""All in one transaction, and without psql, which an image may not have. What is replaced keeps its
privileges."""


def register_checks() -> None:
    register(check_settings)
    register(check_vendor)
    register(check_psycopg)
    register(check_autocommit)
    register(check_databases, Tags.database)


def check_settings(**_: Any) -> list[CheckMessage]:
    try:
        settings = conf.current()
    except SettingsError as error:
        return [Error(problem, id="spark_outbox.E001") for problem in str(error).splitlines()]
    return [
        Error(
            f"SPARK_OUTBOX['LISTEN_DATABASE'] names {alias!r}, which is not in DATABASES.",
            id="spark_outbox.E002",
        )
        for alias in settings.listen_aliases
        if alias not in connections
    ]


def check_autocommit(**_: Any) -> list[CheckMessage]:
    from spark_outbox.models import OutboxEvent

    try:
        settings = conf.current()
    except SettingsError:
        return []
    alias = router.db_for_write(OutboxEvent)
    found: list[CheckMessage] = []
    for each in dict.fromkeys([alias, *settings.listen_aliases]):
        if each in connections:
            try:
                bounds.check(each, None)
            except SettingsError as error:
                found.append(Error(str(error), id="spark_outbox.E004"))
    return found


def check_vendor(**_: Any) -> list[CheckMessage]:
    from spark_outbox.models import OutboxEvent

    alias = router.db_for_write(OutboxEvent)
    vendor = connections[alias].vendor
    if vendor == "postgresql":
        return []
    return [
        Error(
            f"The outbox would be in database {alias!r}, which is {vendor}.",
            hint="spark_outbox needs PostgreSQL: set the ENGINE of that database to "
            "'django.db.backends.postgresql'. With several databases, write a router whose "
            "db_for_write() and allow_migrate() send its models to one on PostgreSQL.",
            id="spark_outbox.E003",
        )
    ]


def check_psycopg(**_: Any) -> list[CheckMessage]:
    """Compare the version of the driver that Django's backend has loaded: it may be psycopg2."""
    from spark_outbox.models import OutboxEvent

    if connections[router.db_for_write(OutboxEvent)].vendor != "postgresql":
        return []
    from django.db.backends.postgresql.base import psycopg_version

    version = psycopg_version()
    if version >= PSYCOPG:
        return []
    return [
        Error(
            f"Django uses psycopg {'.'.join(map(str, version))}, which is too old.",
            hint=f"pip install 'psycopg>={'.'.join(map(str, PSYCOPG))}'",
            id="spark_outbox.E005",
        )
    ]


def check_databases(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Compare each database with what the outbox needs. Run by `migrate` and `check --database`.

    An error would keep `migrate` from running. So there is none before it has done its part.
    """
    try:
        settings = conf.current()
    except SettingsError:
        return []
    outboxes = [
        alias
        for alias in databases or ()
        if connections[alias].vendor == "postgresql" and waking.outbox_oid(using=alias) is not None
    ]
    found = list(_connections(outboxes, settings))
    for alias in outboxes:
        misdefined = list(_definitions(alias))
        found += misdefined
        if not misdefined and checking.has_outbox(using=alias):
            found += [*_state(alias, settings), *_contents(alias), *_ported(alias)]
    return found


def _connections(outboxes: Sequence[str], settings: conf.Settings) -> Iterator[CheckMessage]:
    """Look at the connections that must be direct, of these alone: others are not to be connected to."""
    direct = {alias: settings.direct(alias) for alias in outboxes}
    pooled = {
        alias for alias in outboxes if alias in direct.values() and checking.is_pooled(using=alias)
    }
    for alias in sorted(pooled):
        yield checks.Warning(
            f"Database {alias!r} is behind a transaction pooler: a worker that LISTENs there is not "
            "woken, and others can't see that it lives.",
            hint="Name the alias of a direct connection in SPARK_OUTBOX['LISTEN_DATABASE'], or None.",
            id="spark_outbox.W003",
        )
    for alias, other in direct.items():
        if other in direct and other not in pooled:
            try:
                bounds.check_direct(alias, other)
            except SettingsError as error:
                yield Error(str(error), id="spark_outbox.E008")


def _definitions(alias: str) -> Iterator[CheckMessage]:
    """Look at the migrations, and if they have run, at what they have defined."""
    applied = definitions.applied(using=alias)
    if applied.lacking:
        yield checks.Warning(
            f"Database {alias!r} lacks migrations of spark_outbox: {_names(applied.lacking)}.",
            hint=f"Run manage.py migrate --database {alias}.",
            id="spark_outbox.W002",
        )
    elif not applied.is_newer and (differences := definitions.differences(using=alias)):
        texts = [
            f"the {each.kind} {each.name} {'is absent' if is_absent else 'differs'}"
            for each, is_absent in differences
        ]
        files = dict.fromkeys(str(each.path) for each, _ in differences)
        command = DEFINE_AGAIN.format(files=" ".join(map(shlex.quote, files)), alias=alias)
        problem = (
            f"Database {alias!r} is not as the migrations of spark_outbox leave it: {_names(texts)}."
        )
        hint = (
            "The migrations are applied, so migrate changes nothing. Run as the owner of the "
            f"tables:\n    {command}\nthen migrate, and deploy/roles.sql if you have its roles."
        )
        # An error stops `migrate` of the whole project: so one only where emit() or workers may fail.
        if any(is_absent and each.kind != "view" for each, is_absent in differences):
            hint += " Until then, migrate --skip-checks runs the migrations of other apps."
            yield Error(problem, hint=hint, id="spark_outbox.E006")
        else:
            yield checks.Warning(problem, hint=hint, id="spark_outbox.W007")


def _state(alias: str, settings: conf.Settings) -> Iterator[CheckMessage]:
    wanted, actual = settings.WAKE, waking.wake_mode(using=alias)
    if wanted != actual:
        yield checks.Warning(
            f"SPARK_OUTBOX['WAKE'] is {wanted!r}, but the trigger in database {alias!r} "
            f"is in mode {actual!r}.",
            hint="Run manage.py migrate: it sets the mode.",
            id="spark_outbox.W001",
        )
    if checking.ids_are_behind(using=alias):
        yield Error(
            f"The id sequence of the outbox in database {alias!r} is behind the table: "
            "events can't be emitted.",
            hint=f"Run as the owner of the table: {checking.PUT_IDS_RIGHT}",
            id="spark_outbox.E007",
        )


def _contents(alias: str) -> Iterator[CheckMessage]:
    """Compare this code with what is stored: before a deployment these are its consequences."""
    found = fitting.misfits(registry, using=alias)
    if found.unmatched:
        yield checks.Warning(
            f"Database {alias!r} has pending events that no handler of this code matches, of the "
            f"groups {_examples(found.unmatched)}.",
            hint="If no other release has a handler, they become unhandled.",
            id="spark_outbox.W004",
        )
    if found.unreadable:
        yield checks.Warning(
            f"Database {alias!r} has pending events that this code can't decode, of the groups "
            f"{_examples(found.unreadable)}.",
            hint="They refer to a model or database that is gone, or have no payload that emit() "
            "writes: they would fail. Deploy the code that can, or discard them with spark_discard.",
            id="spark_outbox.W005",
        )
    if found.owed:
        yield checks.Warning(
            f"Database {alias!r} has pending events that are owed to handlers which this code does not "
            f"have: {_examples(found.owed)}.",
            hint="A handler that was renamed: keep its name with name=…. One that was removed: an hour "
            "after they are due, they are discarded.",
            id="spark_outbox.W006",
        )
    if found.idle:
        yield Info(
            f"These handlers match no group of the last two weeks in database {alias!r}: "
            f"{_names(found.idle)}.",
            hint="Is the pattern right, and are their events still emitted?",
            id="spark_outbox.I001",
        )
    if found.strange:
        yield Info(
            f"No handler matches these groups of the last two weeks in database {alias!r}: "
            f"{_names(found.strange)}.",
            id="spark_outbox.I002",
        )
    if found.hidden:
        yield Info(
            f"This role may not read {', '.join(found.hidden)} in database {alias!r}: whether this "
            "code fits them is not known.",
            hint="Run the checks with the worker's role.",
            id="spark_outbox.I003",
        )


def _ported(alias: str) -> Iterator[CheckMessage]:
    """Look for keys that django-spark has handled, unless the next `migrate` takes them over."""
    if (problem := ported.problem(using=alias)) and not operations.is_planned(using=alias):
        yield Error(
            problem,
            hint=f"{ported.remedy(alias)} (before the next migrate), or silence this check to do "
            "without.",
            id="spark_outbox.E009",
        )


def _examples(counted: Sequence[Counted]) -> str:
    return _names([f"{each.name} ({each.number}, as {each.key!r})" for each in counted])


def _names(found: Sequence[str]) -> str:
    more = [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
    return ", ".join([*found[:NAMED], *more])

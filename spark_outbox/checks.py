"""System checks: settings and databases that can't work."""

from collections.abc import Sequence
from typing import Any

from django.core import checks
from django.core.checks import CheckMessage, Error, Tags, register
from django.db import connections, router

from spark_outbox import conf
from spark_outbox.errors import SettingsError
from spark_outbox.store import checking, waking
from spark_outbox.worker import bounds


def register_checks() -> None:
    register(check_settings)
    register(check_vendor)
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
            f"The router sends the outbox to database {alias!r}, which is {vendor}.",
            hint="spark_outbox needs PostgreSQL. With several databases, write a router whose "
            "db_for_write() and allow_migrate() send its models to a PostgreSQL database.",
            id="spark_outbox.E003",
        )
    ]


def check_databases(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Compare each database with what the outbox needs. Run by `migrate` and `check --database`."""
    found: list[CheckMessage] = []
    for alias in databases or ():
        connection = connections[alias]
        if connection.vendor != "postgresql" or not checking.has_outbox(using=alias):
            continue
        wanted, actual = conf.current().WAKE, waking.wake_mode(using=alias)
        if wanted != actual:
            found.append(
                checks.Warning(
                    f"SPARK_OUTBOX['WAKE'] is {wanted!r}, but the trigger in database {alias!r} "
                    f"is in mode {actual!r}.",
                    hint="Run manage.py migrate: it sets the mode.",
                    id="spark_outbox.W001",
                )
            )
        if checking.ids_are_behind(using=alias):
            found.append(
                Error(
                    f"The id sequence of the outbox in database {alias!r} is behind the table: "
                    "events can't be emitted.",
                    hint=f"Run as the owner of the table: {checking.PUT_IDS_RIGHT}",
                    id="spark_outbox.E007",
                )
            )
    return found

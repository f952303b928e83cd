"""The sessions of workers: which are there, how a handler loses its own, and who takes over then."""

from typing import Any

from django.db import connection

from spark_outbox import Event
from spark_outbox.worker import takeover
from spark_outbox.worker.private import NAME
from tests.tools import connect, statuses

LOCKS = f"select pid from pg_stat_activity where starts_with(application_name, '{NAME} ')"


def private_sessions() -> set[Any]:
    """Return the backends that hold workers' locks."""
    with connect() as other:
        return {pid for (pid,) in other.execute(LOCKS)}


def look() -> list[str]:
    """Be another worker that looks for what those that are gone have left; return what still runs."""
    takeover.take_over(using="default")
    return [key for key, status in statuses().items() if status == "running"]


def terminate(event: Event | None) -> None:
    """A handler that ends its own session."""
    with connection.cursor() as cursor:
        cursor.execute("select pg_terminate_backend(pg_backend_pid())")


def terminate_from_outside(event: Event | None) -> None:
    """Be ended between two statements, and notice nothing: the worker does, as it settles."""
    with connect() as other:
        other.execute("select pg_terminate_backend(%s, 10000)", [connection.connection.info.backend_pid])

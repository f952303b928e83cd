"""Handlers that fail, for tests of what comes of it."""

from collections.abc import Callable

from django.db import connection

from spark_outbox import Event
from tests.tools import note


def raising(error: Exception) -> Callable[[Event], None]:
    """Return a handler that writes to the ledger, and raises `error`."""

    def fail(event: Event) -> None:
        note(event)
        raise error

    return fail


def division_by_zero(event: Event) -> None:
    with connection.cursor() as cursor:
        cursor.execute("select 1 / 0")

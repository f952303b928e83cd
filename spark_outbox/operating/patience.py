"""How long the queries of pages, and of what machines watch, may take."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import OperationalError, transaction
from psycopg.errors import QueryCanceled

from spark_outbox.store import limiting

MILLISECONDS = 10_000
"""The longest that one query may take."""


class TooSlow(Exception):
    """The database did not answer a query in time."""


@contextmanager
def in_time(*, using: str) -> Iterator[None]:
    """Have each query of the block, which is a transaction, end in time. Raises TooSlow."""
    try:
        with transaction.atomic(using=using):
            limiting.limit_transaction(MILLISECONDS, using=using)
            yield
    except OperationalError as error:
        if isinstance(error.__cause__, QueryCanceled):
            raise TooSlow from error
        raise

"""The state in which each handler of a batch gets the connection, and in which it must leave it."""

from operator import attrgetter
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

_CURSORS = attrgetter("row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold")


class Frame(NamedTuple):
    raw: Any
    """Psycopg's connection."""
    blocks: int
    """The number of Django's atomic blocks."""
    savepoints: int
    callbacks: int
    """The number of on_commit callbacks that are the worker's own."""
    cursors: tuple[Any, ...]
    """How psycopg makes cursors: handlers change it, and the worker's own queries rely on it."""

    @classmethod
    def of(cls, connection: BaseDatabaseWrapper) -> "Frame":
        return cls(
            connection.connection,
            len(connection.atomic_blocks),
            len(connection.savepoint_ids),
            len(connection.run_on_commit),
            _CURSORS(connection.connection),
        )

    def restore_cursors(self) -> None:
        raw = self.raw
        raw.row_factory, raw.cursor_factory, raw.server_cursor_factory, raw.prepare_threshold = (
            self.cursors
        )

"""Watch what is sent to the server."""

import re
from typing import Any, Self

import psycopg
import pytest

from spark_outbox.store import isolating


class Statements:
    """Every query that goes over the wire, ours included, but for BEGIN and COMMIT."""

    def __init__(self) -> None:
        self.sql: list[str] = []

    def __enter__(self) -> Self:
        self._patch = pytest.MonkeyPatch()
        execute, savepoint = psycopg.Cursor.execute, isolating.savepoint

        def record(cursor: Any, sql: str, *args: Any, **kwargs: Any) -> Any:
            self.sql.append(sql)
            return execute(cursor, sql, *args, **kwargs)

        def record_savepoint(sql: str, *, using: str) -> None:
            self.sql.append(sql)
            savepoint(sql, using=using)

        self._patch.setattr(psycopg.Cursor, "execute", record)
        self._patch.setattr(isolating, "savepoint", record_savepoint)
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, sql, re.IGNORECASE)) for sql in self.sql)

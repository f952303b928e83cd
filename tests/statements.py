"""Watch what is sent to the server."""

import re
from typing import Any, Self

import psycopg
import pytest

from spark_outbox.store import connection, prepared, resting


class Statements:
    """Every query that goes over the wire, ours included, but for BEGIN and COMMIT."""

    def __init__(self) -> None:
        self.sql: list[str] = []

    def __enter__(self) -> Self:
        self._patch = pytest.MonkeyPatch()
        self._record(psycopg.Cursor, "execute", 1)
        self._record(connection, "send", 0)
        self._record(prepared, "send", 0)
        self._record(resting, "send", 0)
        self._record(resting, "send_several", 0)
        return self

    def _record(self, owner: Any, name: str, position: int) -> None:
        function = getattr(owner, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            self.sql.append(args[position])
            return function(*args, **kwargs)

        self._patch.setattr(owner, name, record)

    def __exit__(self, *error: object) -> None:
        self._patch.undo()

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, sql, re.IGNORECASE)) for sql in self.sql)

"""Put back the settings of a session that a handler has changed, before anything else runs.

They are read before the first statement that may change any, and written after the handler, where they
differ. A handler that sends no such statement costs nothing. A setting stays if a function of the
database has made it unseen.
"""

import math
import re
from typing import Any

from django.db import connections
from psycopg.pq import TransactionStatus

from spark_outbox.store import isolating, limiting
from spark_outbox.worker import wire
from spark_outbox.worker.bounds import Limits, limits, noted_limits

# Settings of a project's own are in no view of PostgreSQL: so they are looked for in the statement.
_OWN_NAME = re.compile(r"[a-z_][\w$]*(?:\.[a-z_][\w$]*)+", re.IGNORECASE)

_HIDDEN = ("role", "session_authorization")

SOUND = {TransactionStatus.IDLE, TransactionStatus.INTRANS}
"""The connection takes statements: no error, COPY or lost connection is in the way."""


class SessionSettings:
    """The settings of the current session of `using`, until the end of a batch or a detached call."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._limits = noted_limits(connections[using].connection)
        self._shown: dict[str, str] = {}
        self._is_known = False
        self._named: dict[str, str | None] = {}

    @property
    def limits(self) -> Limits:
        if self._limits is None:
            self._limits = limits(self._using)
        return self._limits

    def limit(self, seconds: float | None, *, handler: bool = True) -> int:
        """Return the `statement_timeout`, in milliseconds, for a call that may take so many seconds."""
        if seconds is None and self._limits is None:
            return self.own_limit
        project = self.limits.handlers if handler else 0
        if seconds is None:
            return project
        milliseconds = math.ceil(seconds * 1000)
        return min(milliseconds, project) if project else milliseconds

    @property
    def own_limit(self) -> int:
        """The `statement_timeout` outside of handlers; 0 as long as it does not matter."""
        return 0 if self._limits is None else self._limits.own

    def look(self, kind: int, sql: str, params: Any) -> bool:
        """Note the settings, before a statement that may change them; return whether they may have to be
        put back after it."""
        if not kind & (wire.SETS | wire.PIPELINE):
            return False
        pgconn = connections[self._using].connection.pgconn
        may_ask = pgconn.transaction_status in SOUND and not pgconn.pipeline_status
        mentioned = _OWN_NAME.findall(sql if params is None else f"{sql} {params!r}")
        names = [name for name in (*_HIDDEN, *mentioned) if name not in self._named]
        if may_ask and (names or not self._is_known):
            _ = self.limits  # before they change, too
            shown, named = isolating.settings(names, using=self._using)
            self._named |= named
            if not self._is_known:
                self._shown, self._is_known = shown, True
        elif pgconn.pipeline_status:  # where nobody can ask: they come back empty
            self._named |= dict.fromkeys(names)
        return bool(kind & wire.SETS) and self._is_known

    def put_back(self, *, first: str = "", in_transaction: bool) -> None:
        """Restore what was changed, after the statement `first`, in one round trip."""
        limits = self.limits
        timeouts = [limiting.LIMIT_SESSION.format(milliseconds=limits.session)]
        if in_transaction and limits.own != limits.session:
            timeouts.append(limiting.LIMIT_STATEMENTS.format(milliseconds=limits.own))
        isolating.restore_settings(
            self._shown,
            self._named,
            first=first,
            local=limiting.SET_BY_TRANSACTION if limits.is_shared else (),
            limits=timeouts,
            using=self._using,
        )

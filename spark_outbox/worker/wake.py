"""The worker's half of the wake protocol: sleep so that no event is missed, and wake at once.

The trigger, in migrations/sql/0001_wake.sql, notifies only while a worker sleeps. Two advisory locks
decide it:

    K  held shared, to the end of its transaction, by every transaction that has emitted
    S  held shared, for as long as it sleeps, by every sleeping worker

    worker, nothing left to claim:
        take S
        K is free: no emit is in flight. Emitters see S from now on, and notify:
            look once more; still nothing: wait for a notification
        K is held: someone emitted before S was taken, and will commit in silence:
            let S go and claim again after a short pause, which grows from 1 to 50 ms;
            once it has grown, keep S: only that straggler's own commit is late by a pause

This module takes the locks, looks and waits; the worker does the claiming. A notification only shortens
latency: the worker would find each event without it, when its wait ends.
"""

import contextlib
import math
import os
from collections.abc import Callable

from django.db import connections

from spark_outbox.store import resting, waking
from spark_outbox.store.connection import fetch_value, past_wrappers
from spark_outbox.store.resting import Outlook
from spark_outbox.worker.context import Context

MIN_PAUSE = 0.001
MAX_PAUSE = 0.05


class Wake:
    """One worker's sleep. It LISTENs on the direct connection; without one it polls only. `poll` waits
    until a file descriptor can be read, and returns which can."""

    def __init__(self, context: Context, *, poll: Callable[[list[int], float], set[int]]) -> None:
        self._context = context
        self._using = None if context.settings.WAKE == "never" else context.direct
        self._poll = poll
        self._oid = 0  # of the table whose S we have taken
        self._listens = False
        self._is_prepared = False
        self._holds_s = False
        self._is_leaving = False
        self._notified = False
        self._pause = MIN_PAUSE
        self._pipe: tuple[int, int] | None = None

    def open(self) -> int:
        """Prepare for being interrupted; return the file descriptor that does it when written to."""
        if self._pipe is None:
            self._pipe = os.pipe()
            for descriptor in self._pipe:
                os.set_blocking(descriptor, False)
        return self._pipe[1]

    def __del__(self) -> None:
        # Not earlier: a thread that may still interrupt us holds a reference.
        for descriptor in self._pipe or ():
            os.close(descriptor)

    def start(self) -> None:
        """Prepare for the sleep in a new session."""
        self._holds_s = self._is_leaving = self._listens = self._is_prepared = False
        if self._using is not None:
            connection = connections[self._using]
            connection.ensure_connection()
            # Without a handler of ours, psycopg would keep what arrives meanwhile for ever.
            connection.connection.add_notify_handler(self._on_notify)

    def stop_listening(self) -> None:
        """Hear nothing until `fall_asleep`, and let S go: nobody reads the connection meanwhile."""
        if statements := self._partings():
            past_wrappers(statements, self._using or "")

    def fall_asleep(self) -> tuple[float, Outlook]:
        """Take S, probe K and look; return the seconds for which sleeping is safe, maybe infinity, and
        what was seen.

        If there are events, the caller claims before it sleeps. S stays held where that makes the sleep
        safe.
        """
        groups = self._context.groups
        if self._using is None:
            self._notified = False
            return math.inf, resting.outlook(groups=groups, using=self._context.using)
        if not self._is_prepared:
            resting.prepare(groups=groups, using=self._using)
            self._is_prepared = True
        self._has_heard()
        self._notified = False
        # Never waits for S: an emitter that was interrupted between the trigger's two calls holds
        # it for the rest of its session.
        asleep = resting.fall_asleep(listens=self._listens, using=self._using)
        self._listens = True
        self._holds_s, self._oid = asleep.holds_s, asleep.oid
        if asleep.is_safe:
            self._pause = MIN_PAUSE
            return math.inf, asleep.outlook
        self._pause = min(self._pause * 2, MAX_PAUSE)
        if self._pause < MAX_PAUSE:
            self.let_go()
        return self._pause, asleep.outlook

    def look(self) -> Outlook:
        """Look once more, after falling asleep."""
        if self._using is not None:
            outlook = resting.look(listens=self._listens, using=self._using)
            self._listens = True
            return outlook
        return resting.outlook(groups=self._context.groups, using=self._context.using)

    def guards(self, oid: int) -> bool:
        """Return whether S, if held, is that of the outbox: of the table with this OID.

        It is not after a restore that has dropped the table, whose trigger asks for another S.
        """
        return not self._holds_s or oid == self._oid

    def wake_up(self) -> None:
        """There is work: let S go, and start with the shortest pause when it is done."""
        self._context.watch.work()
        self._pause = MIN_PAUSE
        self.let_go()
        self._is_leaving = self._listens  # what comes while it looks is heard; the next claim ends that

    def let_go(self) -> None:
        """Release S, if held: who emits from now on need not notify."""
        if self._holds_s:
            self._holds_s = False
            fetch_value(waking.LET_GO_OF_S.format(oid=self._oid), using=self._using or "")

    def let_go_with_next(self) -> None:
        """UNLISTEN and release S before the next claim, in the same round trip: see `parting`."""
        self._is_leaving = True

    def parting(self, can_go_ahead: Callable[[], bool]) -> str:
        """Before a claim, unless we only look before we sleep: UNLISTEN, and let S go.

        A session in a transaction reads no notification. While it is long, the server would keep those
        of everybody; and one that nobody reads would fill its socket.

        Return the statements for that if they `can_go_ahead` of the claim, in its round trip.
        """
        if self._is_leaving and can_go_ahead():
            return self._partings()
        if self._is_leaving:
            self.stop_listening()
        return ""

    def _partings(self) -> str:
        statements = [waking.UNLISTEN] if self._listens else []
        if self._holds_s:
            statements.append(waking.LET_GO_OF_S.format(oid=self._oid))
        self._holds_s = self._listens = self._is_leaving = False
        return "; ".join(statements)

    def wait(self, timeout: float) -> bool:
        """Sleep for up to `timeout` seconds; return whether a notification or interrupt() ended it.

        Raises OperationalError if the connection is lost meanwhile.
        """
        if self._using is None:
            return self.pause(timeout)
        if not self._has_heard():
            connection = connections[self._using]
            if self._select(connection.connection.fileno(), timeout):
                with connection.wrap_database_errors:
                    connection.connection.pgconn.consume_input()
                self._has_heard()
        notified, self._notified = self._notified, False
        return notified

    def pause(self, seconds: float) -> bool:
        """Sleep without the database; return whether interrupt() ended it."""
        self._select(None, seconds)
        interrupted, self._notified = self._notified, False
        return interrupted

    def interrupt(self) -> None:
        """End the current wait, or the next one, at once. May be called by a signal handler."""
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):  # it is full of interrupts already
                os.write(self._pipe[1], b"!")

    def _select(self, connection: int | None, seconds: float) -> bool:
        """Wait for the connection or an interrupt; return whether the connection has something."""
        pipe = None if self._pipe is None else self._pipe[0]
        watch = self._context.watch.descriptor
        descriptors = [each for each in (connection, pipe, watch) if each is not None]
        ready = self._poll(descriptors, min(seconds, 86_400.0))
        if watch in ready:
            self._context.watch.answer()
            self._notified = True
        if pipe in ready and pipe is not None:
            with contextlib.suppress(BlockingIOError):
                os.read(pipe, 4096)
            self._notified = True
        return connection in ready

    def _has_heard(self) -> bool:
        """Return whether a notification has come; also one that came with an answer of the server, and
        waits in libpq, where psycopg has not seen it."""
        pgconn = connections[self._using or ""].connection.pgconn
        while pgconn.notifies():
            self._notified = True
        return self._notified

    def _on_notify(self, _: object) -> None:
        self._notified = True

"""Find the call that killed a worker together with its supervisor.

A supervisor counts the attempt that killed its child. If a container's OOM killer takes both, nobody is
left to count, and the event would kill each worker that comes after. So each worker has a row while it
lives, with its session, see presence.py. A worker that stops by itself deletes its row.

A row whose session nobody holds tells of an unclean end; but not of a death, if the server was
restarted since, as that ends all sessions. The worker that finds such a row handles as many events one
by one as the dead one can have claimed. It writes each call into its own row before it makes it, on a
connection of its own. If workers die of the same call twice in a row, the next one counts the attempt.
From then on each such end counts at once. Otherwise no call is written.
"""

import contextlib
import logging

from django.db import Error, transaction

import spark_outbox
from spark_outbox.errors import WorkerDied, describe
from spark_outbox.store import sessions
from spark_outbox.worker import booking
from spark_outbox.worker.batch import Batch
from spark_outbox.worker.context import Context
from spark_outbox.worker.identity import identity
from spark_outbox.worker.in_hand import InHand
from spark_outbox.worker.invoke import Announce
from spark_outbox.worker.presence import Presence

logger = logging.getLogger(__name__)

TIMES = 2
"""How often in a row workers die of a call, after one of which nobody knows what it died of, until that
counts as an attempt."""


class Crashes:
    """One worker's row, and what it has found in those of others. Until `enlist`, nothing is written."""

    def __init__(self, context: Context, presence: Presence) -> None:
        self._context = context
        self._presence = presence
        self._in_hand = InHand(context, presence)
        self._session = 0  # that of our row; 0 if there is none
        self._fallen: list[int] = []  # sessions of workers that did not stop by themselves
        # How often in a row they have died of a call:
        self._times: dict[tuple[int | None, str], int] = {}
        self._has_noted = False

    # The worker's row

    def enlist(self) -> bool:
        """Have a row; return whether to look closely.

        Counts the calls that workers were making that did not stop by themselves.
        """
        using = self._context.using
        former, self._session = self._session, self._presence.confirm()
        if former not in (0, self._session):
            sessions.dismiss([former], using=using)
        sessions.enlist(
            self._session,
            identity(),
            version=spark_outbox.__version__,
            is_direct=self._context.is_direct,
            groups=self._context.groups,
            handlers=[handler.name for handler in self._context.registry.handlers],
            using=using,
        )
        self._in_hand.start()
        with transaction.atomic(using=using):
            fallen = sessions.fallen_workers(self._session, using=using)
            counted = [each for each in fallen if each.times >= TIMES]
            sessions.forget_call([each.session for each in counted], using=using)
        for each in counted:
            self._count(each)
        self._times = {(each.event_id, each.handler): each.times for each in fallen}
        self._fallen = [each.session for each in fallen]
        return bool(fallen)

    def resign(self) -> None:
        """The worker stops by itself."""
        if self._session:
            sessions.dismiss([self._session], using=self._context.using)
            self._session = 0
            self._presence.end()

    def _count(self, fallen: sessions.FallenWorker) -> None:
        registry = self._context.registry
        for handler in registry.handlers:
            if handler.name == fallen.handler and fallen.event_id is not None:
                error = WorkerDied(
                    "The worker process and its supervisor died while it ran this handler."
                )
                called = [(fallen.event_id, handler.number)]
                session, using = fallen.session, self._context.using
                booking.book(called, error, registry, session=session, is_guess=True, using=using)

    # Its calls

    def announcer(self, batch: Batch) -> Announce:
        """Return what to call before each call of this batch. It writes the call down, if there is
        cause: then the batch has one event."""
        guard = self._context.guard
        if not self._session or not (self._fallen or batch.has_killed):
            return guard.take_in_hand
        least = TIMES if batch.has_killed else 1

        def announce(*called: tuple[int, int]) -> None:
            guard.take_in_hand(*called)
            for event_id, number in called:
                self._note(event_id, number, least)

        return announce

    def _note(self, event_id: int, number: int, least: int) -> None:
        name = self._context.registry.handlers[number].name
        times = max(least, self._times.get((event_id, name), 0) + 1)
        self._has_noted = True
        try:
            self._presence.run(sessions.note_call, [self._session], event_id, name, times)
        except Error as error:  # the call is not at fault, and is made all the same
            details = {"event_id": event_id, "error": describe(error)}
            logger.warning(
                "The call on event %(event_id)s could not be written down (%(error)s).",
                details,
                extra=details,
            )

    def clear(self) -> None:
        """In the transaction that settles the batch: nothing of it is being called any more."""
        if self._has_noted:
            sessions.forget_call([self._session], using=self._context.using)

    def settled(self, *, closely: bool) -> None:
        """After that; `closely`: the worker still handles each event by itself."""
        self._has_noted = False
        if self._fallen and not closely:
            sessions.dismiss(self._fallen, using=self._context.using)
            self._fallen, self._times = [], {}

    def forget(self) -> None:
        """The batch was rolled back: what was noted is not being called any more."""
        if self._has_noted:
            self._has_noted = False
            with contextlib.suppress(Error):  # then it is gone with the connection, or with the worker
                self._presence.run(sessions.forget_call, [self._session])

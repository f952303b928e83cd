"""What was being called when a worker and its supervisor were killed together.

A supervisor counts the attempt that killed its child. If a container's OOM killer takes both, nobody is
left to count, and the event would kill each worker that comes after. So each worker has a row while it
lives, with its session, see presence.py. One that stops by itself deletes its row.

A row whose session nobody holds tells of an unclean end; but not of a death, if the server was restarted
since, as that ends all sessions. The worker that finds it handles as many
events one by one as the dead one can have claimed. It writes each call into its own row before it makes
it, on a connection of its own. If that is what a worker dies of twice in a row, the next one counts the
attempt. From then on each such end counts at once. Otherwise no call is written.
"""

import contextlib
import logging
import os
import socket

from django.db import Error, transaction

from spark_outbox import store
from spark_outbox.errors import WorkerDied, describe
from spark_outbox.registry.handlers import Registry
from spark_outbox.worker import settle
from spark_outbox.worker.event_loop import InHand
from spark_outbox.worker.outcome import Batch
from spark_outbox.worker.presence import Presence

logger = logging.getLogger(__name__)

TIMES = 2
"""How often in a row workers die of a call, after one of which nobody knows what it died of, until that
counts as an attempt."""


class Watched(InHand):
    """One worker's note of what is in hand, which is written down while `watch` says so.

    `inner` is the note that the supervisor reads. Until `enlist`, nothing is written.
    """

    def __init__(self, inner: InHand, registry: Registry, *, using: str, presence: Presence) -> None:
        self._inner = inner
        self._registry = registry
        self._using = using
        self._presence = presence
        self._session = 0  # that of our row; 0 if there is none
        self._fallen: list[int] = []
        self._times: dict[tuple[int | None, str], int] = {}
        self._is_watching = self._has_killed = False
        self._has_noted = False

    # The worker's row

    def enlist(self) -> bool:
        """Have a row; return whether to look closely.

        Counts the calls that workers were making that did not stop by themselves.
        """
        former, self._session = self._session, self._presence.confirm()
        if former not in (0, self._session):
            store.dismiss([former], using=self._using)
        name = f"{socket.gethostname()}:{os.getpid()}"
        store.enlist(self._session, name, using=self._using)
        with transaction.atomic(using=self._using):
            fallen = store.fallen_workers(self._session, using=self._using)
            counted = [each for each in fallen if each.times >= TIMES]
            store.forget_call([each.session for each in counted], using=self._using)
        for each in counted:
            self._count(each)
        self._times = {(each.event_id, each.handler): each.times for each in fallen}
        self._fallen = [each.session for each in fallen]
        return bool(fallen)

    def resign(self) -> None:
        """The worker stops by itself."""
        if self._session:
            store.dismiss([self._session], using=self._using)
            self._session = 0
            self._presence.end()

    def _count(self, fallen: store.FallenWorker) -> None:
        for handler in self._registry.handlers:
            if handler.name == fallen.handler and fallen.event_id is not None:
                error = WorkerDied(
                    "The worker process and its supervisor died while it ran this handler."
                )
                called = [(fallen.event_id, handler.number)]
                settle.book(called, error, self._registry, session=fallen.session, using=self._using)

    # Its calls

    def watch(self, batch: Batch) -> None:
        """Write down the calls of this batch, which has one event, if there is cause."""
        self._has_killed = batch.has_killed
        self._is_watching = bool(self._session) and (bool(self._fallen) or self._has_killed)

    def clear(self) -> None:
        """In the transaction that settles the batch: nothing of it is in hand any more."""
        if self._has_noted:
            store.forget_call([self._session], using=self._using)

    def settled(self, *, closely: bool) -> None:
        """After that; `closely`: the worker still handles each event by itself."""
        self._is_watching = self._has_noted = False
        if self._fallen and not closely:
            store.dismiss(self._fallen, using=self._using)
            self._fallen, self._times = [], {}

    def forget(self) -> None:
        """The batch was rolled back: what was noted is not in hand any more."""
        self._is_watching = False
        if self._has_noted:
            self._has_noted = False
            with contextlib.suppress(Error):  # then it is gone with the connection, or with the worker
                self._presence.run(store.forget_call, [self._session])

    def take_in_hand(self, *called: tuple[int, int]) -> None:
        self._inner.take_in_hand(*called)
        if self._is_watching and len(called) == 1:
            ((event_id, number),) = called
            name = self._registry.handlers[number].name
            times = TIMES if self._has_killed else self._times.get((event_id, name), 0) + 1
            self._has_noted = True
            try:
                self._presence.run(store.note_call, [self._session], event_id, name, times)
            except Error as error:  # the call is not at fault, and is made all the same
                context = {"event_id": event_id, "error": describe(error)}
                logger.warning(
                    "The call on event %(event_id)s could not be written down (%(error)s).",
                    context,
                    extra=context,
                )

    def put_down(self) -> None:
        self._inner.put_down()

    def rest(self) -> None:
        self._inner.rest()

    def identify(self, session: int) -> None:
        self._inner.identify(session)

    def in_hand(self) -> list[tuple[int, int]]:
        return self._inner.in_hand()

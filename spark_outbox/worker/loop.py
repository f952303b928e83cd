"""The worker: claim, dispatch and settle in one transaction on one connection; and sleep in between."""

from typing import Unpack

from django.db import Error

from spark_outbox.store.connection import fixed_schema
from spark_outbox.worker.claims import Claims
from spark_outbox.worker.context import Options, make_context
from spark_outbox.worker.crashes import Crashes
from spark_outbox.worker.cycle import Cycle
from spark_outbox.worker.event_loop import EventLoop
from spark_outbox.worker.presence import Presence
from spark_outbox.worker.quota import Quota
from spark_outbox.worker.retention import Retention
from spark_outbox.worker.running import Running
from spark_outbox.worker.session import Session, check_handlers
from spark_outbox.worker.sleep import Sleep
from spark_outbox.worker.suspicion import Suspicion
from spark_outbox.worker.tempo import POLL, Tempo
from spark_outbox.worker.unhandled import Unhandled
from spark_outbox.worker.wake import Wake


class Worker:
    """Handles the events of one database, one batch after the other.

    `run` is the daemon; `drain` handles what is ready, on the current connection, and returns. For the
    options see context.py. `run` returns after about `max_events`, or once the process has used more
    than `max_rss` MiB.
    """

    def __init__(
        self, *, max_events: int | None = None, max_rss: int | None = None, **options: Unpack[Options]
    ) -> None:
        context = self._context = make_context(**options)
        self._quota = Quota(max_events, max_rss)
        self._loop = loop = EventLoop(context)
        self._wake = wake = Wake(context, poll=loop.poll)
        self._claims = claims = Claims(context)
        self._session = session = Session(context, wake)
        presence = Presence(context)
        self._crashes = crashes = Crashes(context, presence)
        self._suspicion = suspicion = Suspicion(context, claims, wake.pause)
        self._unhandled = Unhandled(context)
        self._running = running = Running(context, presence, wake, loop, on_settled=claims.revisit)
        self._cycle = Cycle(context, session, claims, loop, running, crashes, suspicion, wake)
        self._tempo = Tempo(context.clock)
        self._retention = retention = Retention(context)
        self._sleep = Sleep(context, wake, claims, self._cycle, running, self._unhandled, retention)

    # The loop

    def run(self, *, drain: bool = False, once: bool = False) -> None:
        """Handle events until `stop` is called; with `drain`, until none is ready; or `once`, a batch.

        Outlives the database: it reconnects with a growing pause. With `drain` or `once` only from when
        it has been there, and while it does not refuse what the worker itself asks: then they raise
        the error. Raises NotMigrated if the database has no outbox, SettingsError if
        PostgreSQL can't read `groups`.
        """
        self._session.configure()
        self._wake.open()
        finished = False
        try:
            while not finished:
                self._context.guard.put_down()
                try:
                    self._get_ready()
                    finished = self._work(drain=drain, once=once) or self._context.stop.is_set
                    self._context.watch.work()  # others watch while it stops
                    if finished:
                        self._leave()
                except Error as error:
                    self._context.watch.work()  # or while it waits for the database
                    if (drain or once) and self._session.gives_up(error):
                        raise
                    self._claims.start_over()
                    self._session.recover(error)
                    finished = self._context.stop.is_set and not self._running
        finally:
            self._loop.close()
            self._running.close()
        self._session.announce_end()

    def _work(self, *, drain: bool, once: bool) -> bool:
        """Claim, dispatch and settle until it is time to stop; return True if the work is done."""
        handled, is_idle = 0, False
        while not self._context.stop.is_set and self._session.is_intact:
            self._running.settle()
            if is_idle:
                handled = self._sleep.run(handled)
            else:
                handled = self._cycle.run(sweep=once, inline=False)
                self._running.take_over()
            if once:
                return True
            if drain and not handled and self._running:
                self._running.finish()
            elif drain and not handled:
                handled = self._cycle.run(sweep=True, inline=False)
                if not handled:
                    return True
            self._loop.turn()
            self._session.confirm()
            if self._quota.is_used_up(handled):
                return True
            self._session.tidy()
            self._tempo.note(handled)
            if not drain:
                self._retention.turn(is_busy=handled > 0)
            is_idle = not (drain or is_idle or self._claims.expects_more)
            if is_idle and self._tempo.is_fast and self._sleep.is_ours():
                self._claims.poll()
                self._wake.pause(POLL)
                is_idle = False
        return False

    def drain(self) -> int:
        """Handle ready events until none is left, on the current connection; return how many.

        Of what has waited for a pause that has ended, put back one chunk: its caller may be a request.
        Raises NotMigrated if the database has no outbox, SettingsError if there are detached handlers,
        and no connection but a pooler's.
        """
        check_handlers(self._context)
        total = 0
        with fixed_schema(using=self._context.using):
            try:
                self._running.take_over()
                self._cycle.put_back()
                while handled := self.handle_batch() or self.handle_batch(sweep=True):
                    total += handled
            finally:
                self._running.close()
        return total

    def open(self) -> int:
        """Return a file descriptor for `signal.set_wakeup_fd`: a signal ends the wait that it meets.

        Python may call a signal's handler only after a wait that the signal came just before.
        """
        return self._wake.open()

    def stop(self) -> None:
        """Finish the current handler, commit, and return from `run`. Signal handlers may call it."""
        self._context.stop.is_set = True
        self._wake.interrupt()

    def handle_batch(self, *, sweep: bool = False) -> int:
        """Claim, dispatch and settle in one transaction; return how many events that settled.

        Handlers are called one after the other, also async ones. Raises the error of an outage.
        """
        return self._cycle.run(sweep=sweep, inline=True)

    # The ends

    def _get_ready(self) -> None:
        """Prepare the session, unless the one before still lasts."""
        if not self._session.ensure():
            return
        if self._context.direct is not None and self._crashes.enlist():
            self._claims.look_closely()
        self._session.be_ready()
        self._suspicion.book()
        self._unhandled.put_back()
        self._session.announce()

    def _leave(self) -> None:
        """Finish what is running, and tell others that the worker stops by itself."""
        self._wake.stop_listening()
        self._running.finish()
        self._claims.leave()
        self._crashes.resign()

"""One batch: claim its events, dispatch and settle them, in one transaction on one connection."""

from django.db import Error, transaction

from spark_outbox.events.references import References
from spark_outbox.worker import settle
from spark_outbox.worker.batch import Batch, log
from spark_outbox.worker.claims import Claims
from spark_outbox.worker.context import Context
from spark_outbox.worker.crashes import Crashes
from spark_outbox.worker.dispatch import Dispatch
from spark_outbox.worker.event_loop import EventLoop
from spark_outbox.worker.invoke import BatchLost, Invoker
from spark_outbox.worker.isolation import Isolation
from spark_outbox.worker.observed import Observed, Timing
from spark_outbox.worker.refusals import Refused, refusals
from spark_outbox.worker.running import Running
from spark_outbox.worker.session import Session
from spark_outbox.worker.suspicion import Suspicion
from spark_outbox.worker.wake import Wake


class Cycle:
    """The steps of one worker's batch, in their order."""

    def __init__(  # noqa: PLR0917, put together in one place
        self,
        context: Context,
        session: Session,
        claims: Claims,
        loop: EventLoop,
        running: Running,
        crashes: Crashes,
        suspicion: Suspicion,
        wake: Wake,
    ) -> None:
        self._context = context
        self._using = context.using
        self._pauses = context.experience.pauses
        self._session = session
        self._claims = claims
        self._loop = loop
        self._running = running
        self._crashes = crashes
        self._suspicion = suspicion
        self._wake = wake
        self.handled = 0
        """How many events it has settled so far."""

    def run(self, *, sweep: bool, inline: bool) -> int:
        """Claim, dispatch and settle; return how many events that settled. Heed the pauses; unless
        `inline`, put back what has waited for one that has ended.

        With `sweep`, claim wherever they are in the outbox. With `inline`, call one handler after the
        other, also async ones. If PostgreSQL refuses to settle the events, they are handled again, one
        by one; an event that it refuses alone fails. Raises the error of an outage.
        """
        handled = self._handle(sweep=sweep, inline=inline)
        if not inline:
            self._pauses.put_back_if_due(using=self._using)
        return handled

    def put_back(self) -> None:
        """Put back a chunk of what has waited for a pause that has ended, if it is time."""
        self._pauses.look(using=self._using)
        self._pauses.put_back_if_due(using=self._using)

    def _handle(self, *, sweep: bool, inline: bool) -> int:
        paused = self._pauses.look(using=self._using)
        references = References(self._using)
        batch, dispatch, timing = Batch(), None, Timing(self._context)
        observed = Observed(self._using)
        try:
            with refusals(using=self._using), transaction.atomic(using=self._using):
                batch = self._claim(references, sweep=sweep, inline=inline)
                if not batch.events:
                    return 0
                batch.paused = paused
                timing.start()
                self._wake.wake_up()
                if self._context.guard.is_watched:  # callbacks after the commit take what they take
                    transaction.on_commit(self._context.guard.rest, using=self._using)
                isolation = Isolation(
                    self._using,
                    references,
                    strict=self._claims.careful,
                    apart=self._context.experience.apart,
                )
                announce = self._crashes.announcer(batch)
                with isolation:
                    dispatch = Dispatch(
                        batch,
                        self._context,
                        invoker=Invoker(
                            isolation, self._context.guard, announce, observed, inline=inline
                        ),
                        observed=observed,
                        savepoints=isolation.savepoints,
                        loop=None if inline else self._loop,
                    )
                    dispatch.run()
                self._context.guard.put_down()
                timing.settle()
                self._write(batch)
        except BatchLost as lost:
            self._forget(dispatch)
            self._claims.pass_over(settle.write_alone(lost.works, using=self._using))
            observed.undone(lost.works)
            return len(lost.works)
        except Refused as refused:
            self._forget(dispatch)
            observed.undone()
            if not batch.events:
                raise refused.error from refused.error.__cause__  # which has the SQLSTATE
            return int(self._suspicion.refused(batch, refused)) or self._handle(
                sweep=sweep, inline=inline
            )
        except BaseException as error:
            if isinstance(error, Error) and self._session.is_cut_off:
                self._suspicion.cut_off(batch)
            self._forget(dispatch)
            observed.undone()
            raise
        finally:
            references.close()
        self._running.go_on(batch.calls)
        self._pauses.were_heeded(paused)
        self._learn(batch)
        timing.end(batch.count, observed.calls)
        observed.settled(batch.works)
        self.handled += batch.count
        self._running.begin(batch.calls, inline=inline)
        return batch.count

    def _claim(self, references: References, *, sweep: bool, inline: bool) -> Batch:
        """Lock the events of the next batch. It is empty if nothing can be handled now."""
        first = self._wake.parting(self._claims.can_follow) or self._session.first_statement
        if inline or self._loop.room:
            self._claims.make_room()
        batch = self._claims.next(references, sweep=sweep, first=first)
        if inline or self._loop.room or not batch.events:
            return batch
        handlers_for = self._context.registry.handlers_for
        if all(self._loop.lacks_room(handlers_for(event.group)) for event in batch.events):
            self._claims.pass_by(batch)
            return Batch()
        return batch

    def _write(self, batch: Batch) -> None:
        """Settle the batch, in its transaction."""
        session = self._running.identify() if batch.calls else 0
        settle.write(
            batch.works, done=batch.done, unhandled=batch.unhandled, session=session, using=self._using
        )
        self._claims.hand_over(batch)
        self._crashes.clear()

    def _learn(self, batch: Batch) -> None:
        """After the commit: note how it went."""
        self._context.guard.put_down()
        self._crashes.settled(closely=self._claims.careful)
        self._suspicion.clear(batch)
        self._claims.learn(batch)
        self._context.guard.tally(batch.count, batch.failures)
        log(batch)

    def _forget(self, dispatch: Dispatch | None) -> None:
        """After a rollback: nothing of the batch is being called any more."""
        self._context.guard.put_down()
        self._crashes.forget()
        if dispatch is not None:
            dispatch.abandon()

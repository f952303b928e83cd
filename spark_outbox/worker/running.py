"""Calls that outlive their batch: their deliveries are `running` meanwhile.

They bear the worker's session, see presence.py. Once its lock is free, other workers take them back, and
whatever this one finds out after that applies to nothing any more.
"""

import math
from collections.abc import Callable

from spark_outbox.registry.handlers import Kind
from spark_outbox.worker import bounds, settle, takeover
from spark_outbox.worker.apart import apart
from spark_outbox.worker.batch import Call
from spark_outbox.worker.context import Context
from spark_outbox.worker.event_loop import EventLoop
from spark_outbox.worker.invoke import call_in_time
from spark_outbox.worker.judge import result_of
from spark_outbox.worker.observed import finish, observe, surround
from spark_outbox.worker.outcome import done
from spark_outbox.worker.presence import Presence
from spark_outbox.worker.wake import Wake

TAKE_OVER_INTERVAL = 1.0
"""Seconds between two looks whether the worker of a running delivery is gone."""


class Running:
    """One worker's running calls. `wake` hears nothing while a handler keeps the worker from reading."""

    def __init__(
        self,
        context: Context,
        presence: Presence,
        wake: Wake,
        loop: EventLoop,
        *,
        on_settled: Callable[[list[str]], None],
    ) -> None:
        self._context = context
        self._presence = presence
        self._wake = wake
        self._loop = loop
        self._on_settled = on_settled  # takes ordering keys: others of their events may be possible now
        self._calls: list[Call] = []  # under way, or ended and not settled
        self._take_over_at = -math.inf
        self._stuck: set[int] = set()  # events that can't be put back, which was logged

    def __bool__(self) -> bool:
        return bool(self._calls)

    @property
    def has_ended(self) -> bool:
        return any(call.has_ended for call in self._calls)

    def identify(self) -> int:
        """Return the session that running deliveries bear, holding its lock."""
        return self._presence.hold()

    def close(self) -> None:
        """Give up the session: others may take over whatever is still running."""
        for call in self._calls:
            call.result = None
            finish(call, self._context.using)
        self._presence.end()

    def go_on(self, calls: list[Call]) -> None:
        """Note the calls of deliveries that have been committed as running: some are under way.

        Runs no SQL, as nothing may come between: a call that is not noted would be taken over.
        """
        for call in calls:
            call.session = self._presence.session
        self._calls += [call for call in calls if call.handler.kind is Kind.ASYNC]

    def begin(self, calls: list[Call], *, inline: bool) -> None:
        """Make those of them that are not under way."""
        for call in calls:
            if call.handler.kind is Kind.DETACHED:
                self._make(call, inline=inline)
        self.settle()

    def settle(self) -> None:
        """Write what became of the calls that have ended."""
        ended = [call for call in self._calls if call.has_ended]
        if not ended:
            return
        for call in ended:
            call.result = call.result or result_of(call, self._context) or done(call.seconds)
        left = settle.write_calls(ended, self._context.registry, using=self._context.using)
        self._calls = [call for call in self._calls if call not in ended or call in left]
        for call in ended:
            if call not in left:
                finish(call, self._context.using)
        failed = sum(call.result.status == "failed" for call in ended if call.result is not None)
        self._context.guard.tally(0, failed)
        self._on_settled([str(key) for call in ended if (key := call.event.ordering_key) is not None])

    def finish(self) -> None:
        """Wait for all calls to end, and settle them."""
        if self._calls:
            self._loop.finish()
        self.settle()

    def take_over(self) -> None:
        """Put back what workers have begun that are gone; not more often than it makes sense."""
        clock = self._context.clock
        if clock() >= self._take_over_at:
            if self._calls:
                self._presence.hold()  # the connection may have been lost
            mine = {(call.event.id, call.handler.name) for call in self._calls}
            self._stuck = takeover.take_over(
                session=self._presence.session, mine=mine, known=self._stuck, using=self._context.using
            )
            self._take_over_at = clock() + TAKE_OVER_INTERVAL

    def _make(self, call: Call, *, inline: bool) -> None:
        if call.handler.is_async and not inline:
            self._calls.append(call)
            self._start(call)
            return
        self._loop.finish()  # it stands still meanwhile
        self._wake.stop_listening()
        observe(call, self._context.using)
        with bounds.patience(self._context.using, direct=self._context.is_direct):
            self._calls.append(call)  # if anything failed before, it has not begun: see `take_over`
            self._run(call, inline=inline)

    def _start(self, call: Call) -> None:
        """Read the payload of an async call, and start it on the event loop."""
        guard = self._context.guard
        guard.take_in_hand((call.event.id, call.handler.number))
        try:
            call.event.load()
            self._loop.start([call])
        except BaseException as raised:  # noqa: BLE001, it is the fate of its delivery
            call.error, call.has_ended = raised, True
        finally:
            guard.put_down()

    def _run(self, call: Call, *, inline: bool) -> None:
        """Run a detached handler in no transaction of ours."""
        handler, clock, guard = call.handler, self._context.clock, self._context.guard
        limit = handler.policy.limit()
        call.started = started = clock()
        guard.take_in_hand((call.event.id, handler.number))
        try:
            if handler.is_async:
                call.event.load()  # while queries are possible
            with apart(self._context.using, limit):
                call_in_time(surround(call.observed, handler.call), call.event, limit, guard)
        except BaseException as raised:
            if inline and type(raised) is KeyboardInterrupt:
                raise
            call.error = raised
        finally:
            guard.put_down()
        call.seconds = clock() - started
        call.has_ended = True

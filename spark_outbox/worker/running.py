"""Handlers at work outside of the worker's transaction: their deliveries are `running` meanwhile.

They bear the worker's session, see presence.py. If the lock of that is free, others take them back; and
what the worker finds out after that applies to nothing any more.
"""

import math
from collections.abc import Callable

from spark_outbox.registry.handlers import Registry
from spark_outbox.worker import session, settle
from spark_outbox.worker.dispatch import Dispatcher
from spark_outbox.worker.outcome import Call, succeeded
from spark_outbox.worker.presence import Presence
from spark_outbox.worker.wake import Wake

TAKE_OVER_INTERVAL = 1.0
"""Seconds between two looks whether the worker of a running delivery is gone."""


class Detached:
    """One worker's detached calls. `direct` is the alias of a connection that is no pooler's: its own
    or that which LISTENs. `wake` hears nothing while a handler keeps the worker from reading."""

    def __init__(
        self,
        *,
        using: str,
        direct: str | None,
        presence: Presence,
        wake: Wake,
        dispatcher: Dispatcher,
        registry: Registry,
        clock: Callable[[], float],
        on_settled: Callable[[list[str]], None],
    ) -> None:
        self._using = using
        self._direct = direct or using
        self._presence = presence
        self._wake = wake
        self._dispatcher = dispatcher
        self._registry = registry
        self._clock = clock
        self._on_settled = on_settled  # with ordering keys: others of them may be possible now
        self.calls: list[Call] = []
        """Under way, or ended and not settled."""
        self._take_over_at = -math.inf
        self._stuck: set[int] = set()  # events that can't be put back, which was logged

    @property
    def has_ended(self) -> bool:
        return any(call.ended for call in self.calls)

    def begin(self, calls: list[Call]) -> None:
        """Run what has been committed as running; go on with what runs already."""
        for call in calls:
            call.session = self._presence.session
        self.calls += [call for call in calls if call.handler.atomic]
        for call in calls:
            if not call.handler.atomic:
                self._call(call)
        self.settle()

    def _call(self, call: Call) -> None:
        if call.handler.is_async and self._dispatcher.calls is not None:
            self.calls.append(call)
            self._dispatcher.call_apart(call)
            return
        if self._dispatcher.calls is not None:
            self._dispatcher.calls.finish()  # the event loop stands still meanwhile
        self._wake.stop_listening()
        with session.patience(self._using, direct=self._direct == self._using):
            self.calls.append(call)  # if anything failed before, it has not begun: see `take_over`
            self._dispatcher.call_apart(call)

    def settle(self) -> None:
        """Write what became of the calls that have ended."""
        ended = [call for call in self.calls if call.ended]
        if not ended:
            return
        for call in ended:
            if call.attempt is None:
                call.attempt = self._dispatcher.conclude(call) or succeeded(call)
        left = settle.write_calls(ended, self._registry, using=self._using)
        self.calls = [call for call in self.calls if call not in ended or call in left]
        self._on_settled([str(key) for call in ended if (key := call.event.ordering_key) is not None])

    def finish(self) -> None:
        """Wait for all calls to end, and settle them."""
        if self.calls and self._dispatcher.calls is not None:
            self._dispatcher.calls.finish()
        self.settle()

    def take_over(self) -> None:
        """Put back what workers have begun that are gone; not more often than it makes sense."""
        if self._clock() >= self._take_over_at:
            if self.calls:
                self._presence.hold()  # the connection may have been lost
            mine = {(call.event.id, call.handler.name) for call in self.calls}
            self._stuck = settle.take_over(
                session=self._presence.session, mine=mine, known=self._stuck, using=self._using
            )
            self._take_over_at = self._clock() + TAKE_OVER_INTERVAL

"""Wait, with nothing to do, until there may be something. When to look again is decided in rest.py."""

import math

from spark_outbox.observing import hooks
from spark_outbox.store.resting import Outlook
from spark_outbox.worker.claims import Claims
from spark_outbox.worker.context import Context
from spark_outbox.worker.cycle import Cycle
from spark_outbox.worker.rest import next_look
from spark_outbox.worker.retention import Retention
from spark_outbox.worker.running import Running
from spark_outbox.worker.tempo import POLL
from spark_outbox.worker.unhandled import Unhandled
from spark_outbox.worker.wake import Wake

BEHIND = 0.01
"""Seconds that a worker leaves to another one that was quicker the last time."""


class Sleep:
    """One worker's sleep, whenever it seems to have handled everything."""

    def __init__(  # noqa: PLR0917, put together in one place
        self,
        context: Context,
        wake: Wake,
        claims: Claims,
        cycle: Cycle,
        running: Running,
        unhandled: Unhandled,
        retention: Retention,
    ) -> None:
        self._context = context
        self._wake = wake
        self._claims = claims
        self._cycle = cycle
        self._running = running
        self._unhandled = unhandled
        self._retention = retention
        self._handled: int | None = None  # how many events there were before the last notification

    def run(self, last: int) -> int:
        """Sleep until there may be something to do; see wake.py for the protocol.

        `last` is how many events the last look has found. Return how many were handled instead of
        sleeping, as there was something to do.
        """
        using = self._context.using
        hooks.send(hooks.worker_state_changed, using, using=using, state="asleep", reason="")
        handled, reason = self._sleep(last)
        hooks.send(hooks.worker_state_changed, using, using=using, state="awake", reason=reason)
        return handled

    def _sleep(self, last: int) -> tuple[int, str]:
        if not self._is_our_turn():
            return 0, "turn"
        pause, outlook = self._wake.fall_asleep()
        reason = "round"
        if outlook.ready and not (outlook.ordered or last) and self._context.groups is None:
            reason, outlook = self._wait_for_others(outlook)
        while reason == "round" and not self._context.stop.is_set:
            if outlook.has_events:
                if handled := self._look_everywhere():
                    return handled, "round"
                outlook = self._wake.look()
            reason = self._wait(pause, outlook)
        self._wake.let_go_with_next()
        if reason == "notification":
            self._handled = self._cycle.handled
            self._claims.hurry()
        return 0, reason

    def is_ours(self) -> bool:
        """Say that we have nothing to do; return whether it is for us to look out for events.

        A process in which calls are running always does: they may block it at any time.
        """
        if self._running:
            return True
        self._context.watch.rest()
        return self._context.watch.is_ours

    def _is_our_turn(self) -> bool:
        """Leave it to another process of this supervisor to look out for events, until it is our turn.

        Return False after that: we claim first, as another is at work and there may be more. If nobody
        has given us the watch for a poll interval, that claim is the poll.
        """
        watch, is_woken = self._context.watch, True
        if self.is_ours():
            return True
        self._wake.stop_listening()
        while is_woken and not (self._context.stop.is_set or watch.is_ours):
            is_woken = self._wake.wait(self._context.settings.POLL_INTERVAL)
        if not is_woken:
            self._claims.rest()
        return False

    def _wait_for_others(self, outlook: Outlook) -> tuple[str, Outlook]:
        """Give another worker the time to settle what it holds: it was woken as well, and came first."""
        if self._wake.wait(POLL):
            return "notification", outlook
        return "round", self._wake.look()

    def _look_everywhere(self) -> int:
        """Claim, dispatch and settle one batch, wherever there is one; return how many events."""
        self._claims.rest()
        goes_on = True
        while goes_on and not self._context.stop.is_set:
            if handled := self._cycle.run(sweep=False, inline=False):
                return handled
            goes_on = self._claims.goes_on
        return 0

    def _wait(self, pause: float, outlook: Outlook) -> str:
        """Wait until there may be something to do; return why.

        `pause` is for how many seconds a sleep is safe, see wake.py.
        """
        context, pauses, reason = self._context, self._context.experience.pauses, ""
        # The last notification was in vain: another worker came first, and shall do so again.
        comes_second = self._handled == self._cycle.handled and context.groups is None
        while not reason and not context.stop.is_set:
            self._claims.expect(outlook.due_in)
            if outlook.unhandled and self._unhandled.put_back_if_due():
                return "put back"
            look = next_look(
                outlook,
                poll_interval=context.settings.POLL_INTERVAL,
                pause=pause,
                held=self._claims.held or (outlook.ready and context.groups is None),
                round_in=self._claims.round_in if outlook.has_events else math.inf,
                defers=self._claims.defers,
                retention_in=self._retention.due_in,
                pauses_in=pauses.due_in,
            )
            is_woken = not self._running.has_ended and self._wake.wait(look.seconds)
            if self._running.has_ended:
                reason = "ended"
            elif is_woken and comes_second and not context.stop.is_set:
                self._wake.wait(BEHIND)
                outlook = self._wake.look()
                is_over = outlook.has_events or not (context.watch.is_ours or self._running)
                reason = "notification" if is_over else ""
            elif is_woken:
                reason = "notification"
            elif look.reason in {"poll", "pauses"}:
                pauses.look(using=context.using)
                pauses.put_back_if_due(using=context.using)
                outlook = self._wake.look()
                is_over = outlook.has_events or not self._wake.guards(outlook.oid)
                reason = look.reason if is_over else ""
            else:
                reason = look.reason
        return reason or "stop"

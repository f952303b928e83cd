"""Wait, with nothing to do, until there may be something. When to look again is decided in rest.py."""

from spark_outbox.store import resting
from spark_outbox.worker.claims import Claims
from spark_outbox.worker.context import Context
from spark_outbox.worker.rest import next_look
from spark_outbox.worker.running import Running
from spark_outbox.worker.unhandled import Unhandled
from spark_outbox.worker.wake import Wake


class Sleep:
    """One worker's sleep, after its last look has found nothing."""

    def __init__(
        self, context: Context, wake: Wake, claims: Claims, running: Running, unhandled: Unhandled
    ) -> None:
        self._context = context
        self._wake = wake
        self._claims = claims
        self._running = running
        self._unhandled = unhandled

    def wait(self, pause: float) -> str:
        """Wait until there may be something to do; return why.

        `pause` is for how many seconds a sleep is safe, see wake.py.
        """
        context = self._context
        outlook = resting.outlook(groups=context.groups, using=context.using)
        self._claims.expect(outlook.due_in)
        while not context.stop.is_set:
            if outlook.unhandled and self._unhandled.put_back_if_due():
                return "put back"
            look = next_look(
                outlook,
                poll_interval=context.settings.POLL_INTERVAL,
                pause=pause,
                held=self._claims.held or (outlook.ready and context.groups is None),
                round_in=self._claims.round_in,
                defers=self._claims.defers,
            )
            if self._wake.wait(look.seconds):
                return "notification"
            if self._running.has_ended:
                return "ended"
            if look.reason != "poll":
                return look.reason
            outlook = resting.outlook(groups=context.groups, using=context.using)
            if outlook.ready or outlook.ordered or not self._wake.guards(outlook.oid):
                return "poll"
        return "stop"

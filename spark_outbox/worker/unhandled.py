"""Make events ready again that had no handler, once a worker has one: old workers may meet new groups
first in a deployment, even after this worker has started."""

import logging

from spark_outbox.errors import describe
from spark_outbox.store import repairing
from spark_outbox.worker.context import Context
from spark_outbox.worker.refusals import Refused, refusals

logger = logging.getLogger(__name__)

PUT_BACK_INTERVAL = 60.0
"""Seconds between two looks of a worker that has nothing to do."""

PUT_BACK_CHUNK = 10_000


class Unhandled:
    """One worker's looks at unhandled events."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._look_at = 0.0

    def put_back_if_due(self) -> bool:
        return self._context.clock() >= self._look_at and self.put_back()

    def put_back(self) -> bool:
        """Make events ready that have a handler now; return whether there were any."""
        context, using = self._context, self._context.using
        self._look_at = context.clock() + PUT_BACK_INTERVAL
        groups = repairing.unhandled_groups(groups=context.groups, using=using)
        matched = [group for group in groups if context.registry.handlers_for(group)]
        total = 0
        try:
            # For no longer than until the next look: an older worker may put them aside again.
            while matched and context.clock() < self._look_at and (count := self._put_back(matched)):
                total += count
                context.guard.put_down()
        except Refused as refused:
            details: dict[str, object] = {"error": describe(refused.error), "groups": matched}
            logger.warning("Unhandled events can't be put back (%(error)s).", details, extra=details)
        if total:
            details = {"events": total, "groups": matched}
            logger.info("Put back %(events)s unhandled events.", details, extra=details)
        return total > 0

    def _put_back(self, groups: list[str]) -> int:
        using = self._context.using
        with refusals(using=using):
            return repairing.put_back(groups, limit=PUT_BACK_CHUNK, using=using)

"""Keeps the watch among the children of a supervisor: see watch.py."""

import time
from collections.abc import Iterable

from spark_outbox.processes.place import Child
from spark_outbox.processes.slot import NEVER
from spark_outbox.processes.watch import HANGS, PASS_ON

HEAD_START = 0.5
"""The most seconds for which nobody watches after its holder has died: another would call again what it
died of, before that is booked."""


class Keeper:
    """Knows which child has the watch, and passes it on."""

    def __init__(self) -> None:
        self._holder: Child | None = None
        self.pass_on_at = NEVER
        """When to `pass_on` at the latest."""

    def works(self) -> None:
        """The holder has something to do."""
        if self._holder is not None:
            self.pass_on_at = time.monotonic() + PASS_ON

    def ended(self, child: Child) -> None:
        if child is self._holder:
            self._holder, self.pass_on_at = None, NEVER

    def is_booking(self) -> None:
        """The crash of a child is being booked."""
        if self._holder is None:
            self.pass_on_at = time.monotonic() + HEAD_START

    def has_booked(self) -> None:
        self.pass_on_at = time.monotonic()

    def pass_on(self, children: Iterable[Child]) -> None:
        """Give the watch to a child that is idle, unless its holder is, or has just begun to work."""
        now, holder = time.monotonic(), self._holder
        watches = (
            holder is not None and holder.slot.is_idle() and now - holder.slot.waits_since() < HANGS
        )
        if not watches and now < self.pass_on_at < NEVER:
            return
        self.pass_on_at = NEVER
        if watches:
            return
        others = (child for child in children if child is not holder)
        idle = next((child for child in others if child.slot.is_idle()), None)
        if idle is not None:
            self._holder = idle
            idle.give_watch()
            if not idle.slot.is_idle():  # it has begun to work this moment, and need not have said so
                self.pass_on_at = now + PASS_ON
            if holder is not None:
                holder.take_watch()

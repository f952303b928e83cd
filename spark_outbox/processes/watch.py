"""The watch: one of a supervisor's idle children looks out for events, the others rest.

A child that rests hears no notification, and asks the database nothing until its next poll. The
supervisor gives the watch to the first child that is idle. If its holder is at work for longer than
PASS_ON, hangs, or dies, the supervisor gives it to another one that is idle, which then looks for
events. So none has to wait for a call that takes its time. If all children are at work nobody has to
watch: each looks when it is done.

A child says that it is idle before it asks whether the watch is its own; the supervisor takes the watch
away before it asks whether the child is idle. So two that watch at once find out.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Protocol

from spark_outbox.processes.slot import Slot

PASS_ON = 0.01
"""Seconds that the holder of the watch may be at work before another gets it."""

HANGS = 2.0
"""Seconds that the holder may wait for the database, as it looks, before another gets the watch."""

WORK, REST = b"w", b"z"
"""The bytes by which a child tells its supervisor what it does. No signal has these numbers."""


class Watch(Protocol):
    """The methods of a watch that a worker uses."""

    @property
    def is_ours(self) -> bool:
        """Whether this worker looks out for events when it has none."""

    @property
    def descriptor(self) -> int | None:
        """A file descriptor that can be read when the watch has become ours; None if it always is."""

    def work(self) -> None:
        """Say that this worker has something to do."""

    def rest(self) -> None:
        """Say that it has nothing to do."""

    def answer(self) -> None:
        """Read what the descriptor has."""


class OwnWatch:
    """The watch of a worker that is alone."""

    is_ours = True
    descriptor = None

    def work(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def answer(self) -> None:
        pass


class SharedWatch:
    """The watch, as one child of several sees it."""

    def __init__(self, slot: Slot, descriptor: int, tell: Callable[[bytes], None]) -> None:
        self._slot = slot
        self._tell = tell
        self._rests = False
        self.descriptor = descriptor
        os.set_blocking(descriptor, False)

    @property
    def is_ours(self) -> bool:
        return self._slot.has_watch()

    def work(self) -> None:
        if self._rests:
            self._rests = False
            self._slot.be_idle(False)
            if self.is_ours:
                self._tell(WORK)

    def rest(self) -> None:
        if not self._rests:
            self._rests = True
            self._slot.be_idle(True)
            if not self.is_ours:
                self._tell(REST)

    def answer(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.descriptor, 64)

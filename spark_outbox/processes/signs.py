"""Signs of life: what a supervisor tells systemd, probes and the log about its processes."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from spark_outbox.processes import systemd
from spark_outbox.processes.fork import Pipes
from spark_outbox.processes.place import Child, Place
from spark_outbox.processes.probes import Probes
from spark_outbox.processes.serving import Server
from spark_outbox.processes.slot import NEVER

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""The most seconds between two looks at the processes."""

STATUS_INTERVAL = 5.0
"""The least seconds between two status lines."""

LONG = 60.0
"""Seconds after which a call is logged that is still under way; and again after twice the time."""

SHOWN = 10.0
"""Seconds after which the status line names a call."""

CALLBACKS = (0, -1)
"""What is noted of a process that runs callbacks after a commit."""

UNKILLABLE = 30.0
"""Seconds after which a process that was killed should be gone. It may hang in the kernel: then systemd
hears nothing more, and restarts the service."""


class Signs:
    """Looks at the processes each second. `name_of` returns a handler's name by its number; `metrics` is
    the server that answers with what the processes count."""

    def __init__(
        self,
        *,
        name_of: Callable[[int], str] = str,
        probes: Probes | None = None,
        metrics: Server | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name_of = name_of
        self._probes = probes or Probes()
        self._servers = [each for each in (self._probes.server, metrics) if each is not None]
        self._clock = clock
        self._watchdog = systemd.watchdog_interval()
        self.look_at = 0.0
        """When to look again, on the clock."""
        self._since: dict[tuple[int, int, int], float] = {}  # by process, event and handler
        self._warn_after: dict[tuple[int, int, int], float] = {}
        self._ended = (0, 0)  # what processes have handled that are gone
        self._missing = 0
        self._has_database = False
        self._text = ""
        self._said = ""
        self._said_at = -NEVER
        self._counted = 0

    @property
    def pids(self) -> set[int]:
        """The processes that answer probes and scrapes."""
        return {server.pid for server in self._servers}

    def look(self, places: Sequence[Place], pipes: Pipes, *, state: str = "") -> None:
        """Tell everybody how the processes are; `state` is what the service itself does."""
        now = self._clock()
        if now < self.look_at:
            return
        self.look_at = now + min(INTERVAL, (self._watchdog or NEVER) / 3)
        children = [place.child for place in places if place.child is not None]
        self._note_calls(children, now)
        self._missing = len(places) - len(children)
        has_database = not self._missing and all(child.slot.has_database() for child in children)
        if now - self._said_at >= STATUS_INTERVAL or has_database != self._has_database:
            self._has_database = has_database
            self._text = ", ".join(filter(None, (state, self._summary(children, now))))
            if self._text != self._said:
                systemd.notify(f"STATUS={self._text}", patience=0)
                self._said = self._text
            self._said_at = now
        for server in self._servers:
            server.look_after(pipes)
        if all(now - child.killed_at < UNKILLABLE for child in children):
            self._probes.renew(is_ready=has_database and not state, text=self._text)
            if self._watchdog is not None:
                systemd.notify("WATCHDOG=1", patience=0)

    def ended(self, child: Child) -> None:
        """Keep the numbers of a process that is gone."""
        self._ended = _sum([self._ended, child.slot.tallies()])

    def leave(self) -> None:
        """In a new process: the servers are the supervisor's."""
        for server in self._servers:
            server.leave()

    def stop(self) -> None:
        for server in self._servers:
            server.stop()

    def calls(self, child: Child) -> str:
        """Return in words what a process has in hand; empty if it has nothing."""
        events: dict[int, list[int]] = {}
        for event_id, number in child.slot.in_hand():
            events.setdefault(number, []).append(event_id)
        return ", ".join(
            self._call(ids[0], number) + (f" and {len(ids) - 1} more" if ids[1:] else "")
            for number, ids in events.items()
        )

    def log_kill(self, child: Child, why: str) -> None:
        details = {"pid": child.pid, "why": why, "calls": self.calls(child)}
        logger.warning(
            "The worker process %(pid)s %(why)s, and is killed."
            + (" It has in hand: %(calls)s." if details["calls"] else ""),
            details,
            extra=details,
        )

    def _note_calls(self, children: Iterable[Child], now: float) -> None:
        known, self._since = self._since, {}
        for child in children:
            calls = [CALLBACKS] if child.slot.runs_callbacks() else child.slot.under_way()
            for event_id, number in calls:
                call = (child.pid, event_id, number)
                since = self._since[call] = known.get(call, now)
                if now - since >= self._warn_after.get(call, LONG):
                    self._warn_after[call] = 2 * (now - since)
                    details: dict[str, object] = {
                        "pid": child.pid,
                        "call": self._call(event_id, number),
                        "seconds": int(now - since),
                    }
                    if number >= 0:
                        details |= {"handler": self._name_of(number), "event_id": event_id}
                    logger.warning(
                        "The worker process %(pid)s has been at %(call)s for %(seconds)s s.",
                        details,
                        extra=details,
                    )
        self._warn_after = {call: at for call, at in self._warn_after.items() if call in self._since}

    def _call(self, event_id: int, number: int) -> str:
        if number < 0:
            return "callbacks after a commit"
        return f"{self._name_of(number)} on event {event_id}"

    def _summary(self, children: Sequence[Child], now: float) -> str:
        handled, failed = _sum([self._ended, *(child.slot.tallies() for child in children)])
        rate = (handled - self._counted) / (now - self._said_at)
        self._counted = handled
        parts = [f"{rate:.1f} events/s" if 0 < rate < 10 else f"{rate:.0f} events/s"]
        if self._missing:
            parts.append(f"{len(children)} of {len(children) + self._missing} processes run")
        elif not self._has_database:
            parts.append("waiting for the database")
        elif all(child.slot.back_by() < NEVER for child in children):
            parts.append("0 ready")
        else:
            at_work = sum(child.slot.back_by() == NEVER for child in children)
            parts.append(f"{at_work} of {len(children)} processes at work")
        parts.append(f"{failed} failed")
        if self._since:
            call, since = min(self._since.items(), key=lambda item: item[1])
            if now - since >= SHOWN:
                parts.append(f"{self._call(*call[1:])} for {now - since:.0f} s")
        return ", ".join(parts)


def _sum(tallies: Iterable[tuple[int, int]]) -> tuple[int, int]:
    handled, failed = zip(*tallies, strict=True)
    return sum(handled), sum(failed)

"""Show people a call that takes long: it is noted in the worker's row, see crashes.py.

Nothing else does that: an event in a handler's hands is pending to all others, as nothing is committed.
A thread writes it, as the main one is in the call. Calls that end within a second are not noted.
"""

import contextlib
import threading
import time

from spark_outbox.store import sessions
from spark_outbox.worker.context import Context
from spark_outbox.worker.presence import Presence

INTERVAL = 1.0
"""Seconds between two looks."""


class InHand:
    """One worker's calls, as people see them. Only in a process that a supervisor looks after."""

    def __init__(self, context: Context, presence: Presence) -> None:
        self._context = context
        self._presence = presence
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look from now on, once the worker has a row."""
        if self._context.guard.is_watched and self._thread is None:
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()

    def _follow(self) -> None:
        guard, since, shown = self._context.guard, dict[tuple[int, int], float](), None
        while True:
            time.sleep(INTERVAL)
            now = time.monotonic()
            since = {call: since.get(call, now) for call in guard.under_way()}
            oldest = min(since, key=since.__getitem__, default=None)
            wanted = oldest if oldest and now - since[oldest] >= INTERVAL else None
            if wanted != shown:
                with contextlib.suppress(Exception):  # the next look tries again
                    self._show(wanted, now - since[wanted] if wanted else 0.0)
                    shown = wanted

    def _show(self, call: tuple[int, int] | None, seconds: float) -> None:
        if call is None:
            self._presence.write(sessions.hide_call)
            return
        event_id, number = call
        name = self._context.registry.handlers[number].name
        self._presence.write(sessions.show_call, event_id, name, seconds)

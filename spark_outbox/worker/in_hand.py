"""Show people a call that takes long: it is noted in the worker's row, see crashes.py.

Nothing else does that: an event in a handler's hands is pending to all others, as nothing is committed.
A thread writes it, as the main one is in the call. Calls that end within a second are not noted.
"""

import contextlib
import threading
import time

from django.db import Error

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
        seen, since, is_shown = None, 0.0, False
        while True:
            time.sleep(INTERVAL)
            call = next(iter(self._context.guard.in_hand()), None)
            with contextlib.suppress(Error):  # the main thread finds that, too
                if is_shown and call != seen:
                    self._presence.write(sessions.hide_call)
                    is_shown = False
                elif call is not None and call == seen and not is_shown:
                    event_id, number = call
                    name = self._context.registry.handlers[number].name
                    seconds = time.monotonic() - since
                    self._presence.write(sessions.show_call, event_id, name, seconds)
                    is_shown = True
            if call != seen:
                seen, since = call, time.monotonic()

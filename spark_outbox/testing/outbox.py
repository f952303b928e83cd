"""Outbox: what a test does with the outbox, in one object."""

import time
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from asgiref.sync import sync_to_async
from django.db import connections

from spark_outbox.events.event import Event
from spark_outbox.operating import look
from spark_outbox.registry.handlers import Handler, registry
from spark_outbox.store import testing
from spark_outbox.testing import calling, draining, events, faults
from spark_outbox.testing.calling import AnyHandler
from spark_outbox.testing.crashes import Calls, Proof, prove
from spark_outbox.testing.events import EmittedEvent
from spark_outbox.testing.faults import Fault, Faults

PAUSE = 0.02
"""Seconds between two looks at an event that a test waits for."""

FOR_GOOD = ("done", "failed", "discarded")
"""States in which an event stays until a person does something about it."""


class Outbox:
    """The outbox of one database, for one test.

    Without pytest, in a TestCase's setUp: `self.outbox = self.enterContext(Outbox())`.
    """

    def __init__(self, *, using: str = "default") -> None:
        self.using = using
        self._connection = connections[using]  # of the thread in which fixtures run
        self._faults: Faults | None = None
        self._reverses = False

    def __enter__(self) -> Self:
        self._faults = Faults(self.using)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the faults."""
        if self._faults is not None:
            self._faults.mend()
        self._faults = None

    # Events

    def emitted(self, group: str = "") -> list[EmittedEvent]:
        """Return the stored events whose group matches the regex `group`, in order. Each has its
        `status` and its `last_error`."""
        return events.emitted(group, using=self.using)

    def assert_emitted(self, group: str, key: str | None = None, **payload: Any) -> EmittedEvent:
        """Return the first event whose group matches the regex `group`, with this key, and with these
        values in its payload, which may have others, too. Raises AssertionError, which lists all."""
        return events.assert_emitted(group, key, payload, using=self.using)

    def assert_not_emitted(self, group: str, key: str | None = None, **payload: Any) -> None:
        """Raise AssertionError, which lists them, if there are such events."""
        events.assert_not_emitted(group, key, payload, using=self.using)

    # Handling

    def drain(self, *, raise_exceptions: bool = True) -> int:
        """Handle the ready events, as a worker would: see `spark_outbox.testing.drain`."""
        if self._reverses:
            testing.reverse(using=self.using)
        return draining.drain(using=self.using, raise_exceptions=raise_exceptions)

    async def adrain(self, *, raise_exceptions: bool = True) -> int:
        """Do so from async code, on the connection that `aemit` and the async ORM use. Raises
        AssertionError if that is outside of the test's transaction."""
        return await sync_to_async(self._drain_inside)(raise_exceptions)

    def _drain_inside(self, raise_exceptions: bool) -> int:
        if self._connection.in_atomic_block and connections[self.using] is not self._connection:
            raise AssertionError(
                "This async test runs in the fixture's transaction, but its queries do not: they are "
                "committed on another connection. Mark it with django_db(transaction=True)."
            )
        return self.drain(raise_exceptions=raise_exceptions)

    def handle(
        self,
        handler: AnyHandler,
        group: str | None = None,
        key: str | None = None,
        *,
        attempt: int = 1,
        headers: Mapping[str, Any] | None = None,
        **payload: Any,
    ) -> None:
        """Call one handler by itself, with an event that is not in the outbox. Raises what it raises.

        Give its function, which need not be registered, or its name. What it writes is rolled back if
        it raises, unless it is async or has atomic=False. `group` is needed if its pattern matches no
        group that can be guessed.
        """
        found = calling.find(handler, group)
        event = Event(group or calling.group_of(found), key, headers=headers, **payload)
        calling.call(found, event, attempt=attempt, using=self.using)

    # Time

    def advance(self, by: timedelta) -> None:
        """Let this time pass for events that are delayed or wait for another attempt. Their own times
        are moved; no clock is, so what `drain` does after that is due by the clock of the database."""
        testing.advance(by, using=self.using)

    def wait_for(self, key: str, state: str = "done", *, timeout: float = 10.0) -> EmittedEvent:
        """Wait until a worker has brought an event into this state, and return it.

        For tests in which a real worker runs, on committed events: those with `transaction=True`, or of
        a TransactionTestCase. Raises AssertionError, which explains where the event is, after `timeout`
        seconds; or at once if it has ended in another state.
        """
        connection = connections[self.using]
        deadline = time.monotonic() + timeout
        while True:
            event = events.find(key, using=self.using)
            if event is not None and event.status == state:
                return event
            if connection.in_atomic_block:
                raise AssertionError(
                    "No worker sees the events of a transaction that is not committed. Call drain(); or "
                    "mark the test with django_db(transaction=True), or use a TransactionTestCase."
                )
            has_ended = event is not None and event.status in FOR_GOOD
            if has_ended or time.monotonic() >= deadline:
                raise AssertionError(self._where(key, state, event))
            time.sleep(PAUSE)

    def _where(self, key: str, state: str, event: EmittedEvent | None) -> str:
        if event is None:
            return f"There is no event with the key {key!r}."
        lines = [f"The event {key!r} is {event.status}, not {state}."]
        lines += look.explanation(key, using=self.using)
        return "\n".join([*lines, event.last_error]).rstrip()

    # Faults, until the end of the test

    def fail(
        self,
        handler: AnyHandler,
        *,
        on_attempt: int | Collection[int] | None = 1,
        with_: BaseException | type[BaseException] = RuntimeError,
        after: bool = False,
    ) -> None:
        """Let a handler raise on these attempts, None for all, rather than do its work; or `after` it:
        then its writes are rolled back, and calls to others were made. `drain` does not raise it."""
        attempts = [on_attempt] if isinstance(on_attempt, int) else on_attempt
        fault = Fault(attempts=attempts, error=with_, after=after)
        self._inject(fault, self._registered(handler))

    def duplicate(self, handler: AnyHandler | None = None) -> None:
        """Call a handler, or all, twice with each event, as when the worker dies at the end of the first
        call. Its writes are rolled back after the first, if it is of a kind that shares the worker's
        transaction."""
        found = list(registry.handlers) if handler is None else self._registered(handler)
        self._inject(Fault(twice=True), found)

    def reorder(self) -> None:
        """Let `drain` handle the latest event first, as when the others have to be tried again. Events
        with an ordering key keep their order."""
        self._reverses = True

    def slow(self, handler: AnyHandler, seconds: float) -> None:
        """Let a handler take so long. If that is longer than its timeout, nobody waits: HandlerTimeout
        is raised after its work."""
        for each in self._registered(handler):
            self._inject(faults.took_too_long(each, seconds), [each])

    def crash_everywhere(
        self,
        handler: AnyHandler,
        event: Event | Mapping[str, Any],
        *,
        calls: Sequence[Calls] = (),
        repeats: bool = False,
        ignore: Collection[str] = (),
        most: int = 1000,
    ) -> list[str]:
        """Prove that a handler comes to the same end wherever its process dies: cut it off before and
        after each statement and each commit, and call it again. Return these boundaries.

        Raises AssertionError, which lists where the database, or calls to others, end differently from a
        call that nothing has disturbed. Mails are such calls, and so is what the test's fakes record in
        the lists `calls`. With `repeats` equal calls may be made again. Times, UUIDs and fields to
        `ignore`, such as "orders.Order.token", are not compared. Everything is taken back.
        """
        event = Event.of(event)
        found = calling.find(handler, event.group)
        proof = Proof(found, event, calls=calls, repeats=repeats, ignored=ignore, using=self.using)
        return prove(proof, found.name, most=most)

    def _inject(self, fault: Fault, handlers: list[Handler]) -> None:
        if self._faults is None:
            raise RuntimeError(
                "Nothing would end this fault. Write `with Outbox() as outbox`, or in setUp() "
                "`self.outbox = self.enterContext(Outbox())`."
            )
        self._faults.inject(fault, handlers)

    def _registered(self, handler: AnyHandler) -> list[Handler]:
        found = calling.registered(handler)
        if not found:
            raise ValueError(f"{handler!r} is no registered handler.")
        return found

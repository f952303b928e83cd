"""Inject faults into registered handlers: they fail, take long, or are called twice."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

from django.db import transaction

from spark_outbox.errors import HandlerTimeout
from spark_outbox.events.event import Event
from spark_outbox.registry.handlers import Handler, registry

NOTE = "injected by the testing kit of spark_outbox"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    attempts: Collection[int] | None = None
    """None for all."""
    error: BaseException | type[BaseException] | None = None
    after: bool = False
    """The error comes after the handler's work."""
    seconds: float = 0.0
    """The handler takes so long."""
    twice: bool = False

    def strikes(self, events: list[Event]) -> bool:
        return self.attempts is None or events[0].attempt in self.attempts

    @contextmanager
    def around(self, events: list[Event]) -> Iterator[None]:
        """Raise the error before or after the block."""
        if not self.after:
            self._raise(events)
        yield
        if self.after:
            self._raise(events)

    def _raise(self, events: list[Event]) -> None:
        if self.error is None or not self.strikes(events):
            return
        error = self.error() if isinstance(self.error, type) else self.error
        if not is_injected(error):
            error.add_note(NOTE)
        raise error

    def calls(self, handler: Handler, using: str) -> list[AbstractContextManager[Any]]:
        """Return what each call of the handler is to be made in."""
        if not self.twice:
            return [nullcontext()]
        return [nullcontext() if handler.kind.outlives else _undone(using), nullcontext()]


def is_injected(error: BaseException) -> bool:
    return NOTE in getattr(error, "__notes__", ())


@contextmanager
def _undone(using: str) -> Iterator[None]:
    with transaction.atomic(using=using):
        yield
        transaction.set_rollback(True, using=using)


class Faults:
    """The faults of one test."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._sound: dict[str, Handler] = {}
        self._faulty: dict[str, Handler] = {}

    def inject(self, fault: Fault, handlers: list[Handler]) -> None:
        for handler in handlers:
            self._sound.setdefault(handler.name, handler)
            faulty = replace(handler, function=_faulty(fault, handler, self._using), adapt=None)
            self._faulty[handler.name] = faulty
            registry.replace(faulty)

    def mend(self) -> None:
        """End all faults, of handlers that are still registered."""
        for handler in list(registry.handlers):
            faulty = self._faulty.get(handler.name)
            if faulty is not None and handler.function is faulty.function:
                registry.replace(replace(self._sound[handler.name], number=handler.number))
        self._sound.clear()
        self._faulty.clear()


def took_too_long(handler: Handler, seconds: float) -> Fault:
    """Return the fault of a handler that takes `seconds`. If it may not, it is interrupted at once,
    rather than after its timeout, and after its work."""
    limit = handler.policy.limit()
    if limit is None or seconds <= limit:
        return Fault(seconds=seconds)
    return Fault(error=HandlerTimeout(f"It took {seconds:g} s, and may take {limit:g} s."), after=True)


def _faulty(fault: Fault, handler: Handler, using: str) -> Callable[[Any], object]:
    function: Any = handler.start

    @wraps(handler.function)
    def call(argument: Any) -> None:
        events = _events(argument)
        with fault.around(events):
            time.sleep(fault.seconds)
            for block in fault.calls(handler, using):
                with block:
                    function(argument)
                _start_over(events)

    @wraps(handler.function)
    async def call_async(argument: Any) -> None:
        events = _events(argument)
        with fault.around(events):
            await asyncio.sleep(fault.seconds)
            for block in fault.calls(handler, using):
                with block:
                    await function(argument)
                _start_over(events)

    return call_async if handler.is_async else call


def _events(argument: Any) -> list[Event]:
    return [argument] if isinstance(argument, Event) else argument


def _start_over(events: list[Event]) -> None:
    """The next call does not see what the last one has made of the payload."""
    for event in events:
        event.start_over()
